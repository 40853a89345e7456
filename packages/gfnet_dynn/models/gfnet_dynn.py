"""GFNet with early exits: heads and gates after some blocks, and a pass in which samples leave."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.models import op_counter
from gfnet_dynn.models.exit_policy import ExitPolicy, keep_rows
from gfnet_dynn.models.gates import make_gate
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.staged import StagedNetwork

DEFAULT_EXITS = (3, 5, 7, 9)


class ExitOutputs(NamedTuple):
    """A full pass: ``logits``, G+1 of ``(N, K)``, the final head last; ``gate_logits (N, G)``."""

    logits: list[Tensor]
    gate_logits: Tensor


class EarlyExit(NamedTuple):
    """A pass with real exits: ``logits (N, K)``, and ``exit_index (N,)`` in 0..G, input's order."""

    logits: Tensor
    exit_index: Tensor


def check_exits(exits: Sequence[int], depth: int) -> tuple[int, ...]:
    """Sorted block indices, 0-based; the last block has the final head, so no exit sits there.

    Raises:
        ValueError: not sorted, twice the same, or outside 0..depth-2.
    """
    exits = tuple(int(e) for e in exits)
    if list(exits) != sorted(set(exits)) or any(not 0 <= e < depth - 1 for e in exits):
        raise ValueError(
            f"exits: got {list(exits)}, expected rising block indices from 0 to {depth - 2}"
        )
    return exits


class GFNetDynn(nn.Module):
    """A network with a linear head and a gate after each block in ``exits``.

    Every exit sees ``mean(norm(tokens))`` through the backbone's own final norm. Heads keep torch's
    default Linear init, as the original's do; for the gates see ``make_gate``.

    Args:
        backbone: an isotropic GFNet or an EfficientNet-lite; its ``head`` is the final exit.
        exits: 0-based blocks after which exits sit, rising; any number of them.
        gate: ``unc`` or ``identity``.
        gate_init: ``uniform`` or ``torch``.
    """

    def __init__(
        self,
        backbone: GFNet | StagedNetwork,
        exits: Sequence[int] = DEFAULT_EXITS,
        *,
        gate: str = "unc",
        gate_init: str = "uniform",
    ) -> None:
        super().__init__()
        if not isinstance(backbone, GFNet | StagedNetwork):
            raise ValueError(
                f"backbone: got a {type(backbone).__name__}, expected a GFNet or an "
                "EfficientNet-lite: exits need a row of blocks"
            )
        self.exits = check_exits(exits, backbone.depth)
        self.gate_kind, self.gate_init = gate, gate_init
        self.backbone = backbone
        self.exit_heads = nn.ModuleList(
            nn.Linear(backbone.widths[block], backbone.num_classes) for block in self.exits
        )
        self.gates = nn.ModuleList(
            make_gate(gate, num_gates=len(self.exits), init=gate_init) for _ in self.exits
        )

    @property
    def num_gates(self) -> int:
        """G, the number of exits before the final head."""
        return len(self.exits)

    def config(self) -> dict:
        """What rebuilds this network, as plain JSON: ``GFNetDynn.from_config(config)``."""
        return {
            "backbone": self.backbone.config(),
            "exits": list(self.exits),
            "gate": self.gate_kind,
            "gate_init": self.gate_init,
        }

    @classmethod
    def from_config(cls, config: dict) -> "GFNetDynn":
        """An untrained network of the sizes in ``config``."""
        rest = {name: value for name, value in config.items() if name != "backbone"}
        kind = StagedNetwork if "network" in config["backbone"] else GFNet
        return cls(kind(**config["backbone"]), **rest)

    def segment(self, tokens: Tensor, index: int) -> Tensor:
        """Run the blocks behind exit ``index - 1``, up to exit ``index`` (G: up to the last)."""
        first = self.exits[index - 1] + 1 if index else 0
        last = self.exits[index] + 1 if index < self.num_gates else self.backbone.depth
        for block in islice(self.backbone.blocks, first, last):  # a slice would build a module list
            tokens = block(tokens)
        return tokens

    def head(self, index: int) -> nn.Linear:
        """The head of exit ``index``; number G is the backbone's own."""
        return self.exit_heads[index] if index < self.num_gates else self.backbone.head

    def exit_features(self, x: Tensor) -> list[Tensor]:
        """Images ``(N, 3, H, W)`` to the G+1 embeddings ``(N, C)`` that the heads see."""
        tokens, features = self.backbone.stem(x), []
        for index in range(self.num_gates + 1):
            tokens = self.segment(tokens, index)
            features.append(self.backbone.pool(tokens))
        return features

    def classify(self, features: Sequence[Tensor]) -> ExitOutputs:
        """Heads and gates on the G+1 embeddings of :meth:`exit_features`."""
        logits = [self.head(index)(f) for index, f in enumerate(features)]
        if not self.num_gates:
            return ExitOutputs(logits, logits[0].new_zeros(logits[0].shape[0], 0))
        gate_logits = [gate(z) for gate, z in zip(self.gates, logits[:-1], strict=True)]
        return ExitOutputs(logits, torch.stack(gate_logits, dim=1))

    def forward(self, x: Tensor | list[Tensor]) -> ExitOutputs:
        """A full pass: every head and every gate for every sample.

        Args:
            x: images ``(N, 3, H, W)``, or what :meth:`exit_features` said of them.
        """
        return self.classify(x if isinstance(x, list) else self.exit_features(x))

    def exit_costs(self) -> np.ndarray:
        """MACs an image costs that leaves at each exit, heads and gates passed included: (G+1,)."""
        return op_counter.exit_costs(self)

    @torch.no_grad()
    def early_exit(self, x: Tensor, policy: ExitPolicy) -> EarlyExit:
        """Classify images ``(N, 3, H, W)``, dropping each from the batch where it leaves.

        Later blocks, heads and gates see only the samples that are still in. One host sync an exit
        on a GPU (how many left); a batch of one copies and gathers nothing. The logits are those of
        the full pass at the chosen exit, up to what a matrix product of another batch size rounds.
        """
        policy.check(self.num_gates)
        tokens = self.backbone.stem(x)
        n = tokens.shape[0]
        state: dict[str, Tensor] = {}
        rows: Tensor | None = None  # original places of the samples still in; None is all of them
        out: Tensor | None = None
        exit_index = torch.full((n,), self.num_gates, dtype=torch.int64, device=x.device)
        pool, needs_gates = self.backbone.pool, policy.needs_gates
        # Modules by iteration: at batch 1 looking them up by number takes as long as an operation.
        for index, (head, gate) in enumerate(zip(self.exit_heads, self.gates, strict=True)):
            tokens = self.segment(tokens, index)
            logits = head(pool(tokens))
            leaving = policy.leave(index, logits, gate(logits) if needs_gates else None, state)
            here = leaving.shape[0]
            count = int((leaving if here == 1 else leaving.sum()).item())
            if count == 0:
                continue
            if count == here and rows is None:
                return EarlyExit(logits, exit_index.fill_(index))
            if out is None:
                out = logits.new_empty(n, logits.shape[1])
            if rows is None:
                rows = torch.arange(n, device=x.device)
            if count == here:
                out[rows], exit_index[rows] = logits, index
                return EarlyExit(out, exit_index)
            order = torch.argsort(leaving.to(torch.uint8), stable=True)
            stay, go = order[: here - count], order[here - count :]
            gone = rows[go]
            out[gone], exit_index[gone] = logits[go], index
            tokens, rows = tokens.index_select(0, stay), rows[stay]
            keep_rows(state, stay)
        logits = self.backbone.head(pool(self.segment(tokens, self.num_gates)))
        if rows is None:
            return EarlyExit(logits, exit_index)
        out[rows] = logits
        return EarlyExit(out, exit_index)
