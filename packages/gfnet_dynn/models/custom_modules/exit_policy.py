"""One rule that says where a sample leaves: for training, selection, calibration and inference.

Every kind gives each sample a score at each exit; it leaves at the first exit whose score reaches
that exit's threshold, and at the final head when none does. Labels never enter.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gfnet_dynn.models.custom_modules.uncertainty import entropy_from_logits

KINDS = ("gate", "jei", "max_prob", "entropy", "margin", "patience")
STATE_VERSION = 1
NEVER = 2.0  # reached by no score of any kind but patience


@dataclass(frozen=True)
class ExitPolicy:
    """Kind, thresholds and temperatures of an exit rule. Immutable; plain JSON on disk.

    Scores by kind, all in [0, 1] but that of patience:

    - ``gate``: sigmoid of the gate's logit.
    - ``jei``: probability to leave here given that the sample is still in. With gates ``g``, exit
      ``l`` owns the mass ``p_l = max(0, min(g_l, 1 - sum_{j<l} g_j))``, and the score is
      ``p_l / (1 - sum_{j<l} p_j)``; 1 where no mass is left.
    - ``max_prob``: largest softmax probability.
    - ``entropy``: ``1 - H / ln K``, so that more certain is larger here too.
    - ``margin``: largest minus second largest probability.
    - ``patience``: a count: for how many exits in a row the predicted class has not changed.

    Attributes:
        kind: one of ``KINDS``.
        thresholds: one for all exits, or one an exit (the final head has none). A score equal to
            the threshold leaves. More than 1 never leaves (``patience``: more than the exits can
            count). For ``jei`` 0.5 is the rule of its paper.
        temperatures: divide the logits of the heads before max_prob, entropy, margin and
            :meth:`probabilities`; one for all, one an exit, or one more for the final head (1 if it
            is left out). They do not touch the gates, which saw raw logits when they were trained.
        gate_temperatures: divide the gates' logits; one for all or one an exit.

    Source: JEI-DNN, arXiv:2310.09163 (gate, jei); BranchyNet, arXiv:1709.01686 (entropy); PABEE,
    arXiv:2006.04152 (patience).
    """

    kind: str = "gate"
    thresholds: float | Sequence[float] = 0.5
    temperatures: float | Sequence[float] = 1.0
    gate_temperatures: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"exit policy: got kind {self.kind!r}, expected one of {KINDS}")
        for name in ("thresholds", "temperatures", "gate_temperatures"):
            values = getattr(self, name)
            values = np.atleast_1d(np.asarray(values, dtype=np.float64))
            if values.ndim != 1 or not values.size or not np.isfinite(values).all():
                raise ValueError(
                    f"exit policy: got {name} {values.tolist()}, expected finite numbers"
                )
            if name != "thresholds" and values.min() <= 0:
                raise ValueError(f"exit policy: got {name} {values.tolist()}, expected > 0")
            object.__setattr__(self, name, tuple(values.tolist()))

    @classmethod
    def never(cls) -> "ExitPolicy":
        """The policy under which every sample runs to the final head."""
        return cls("max_prob", NEVER)

    @property
    def needs_gates(self) -> bool:
        """Whether the scores are made from gate logits."""
        return self.kind in ("gate", "jei")

    def with_thresholds(self, thresholds: float | Sequence[float]) -> "ExitPolicy":
        """The same rule with other thresholds."""
        return ExitPolicy(self.kind, thresholds, self.temperatures, self.gate_temperatures)

    def check(self, num_gates: int) -> None:
        """Raise a ValueError unless thresholds and temperatures fit ``num_gates`` exits."""
        allowed = {
            "thresholds": {1, num_gates},
            "temperatures": {1, num_gates, num_gates + 1},
            "gate_temperatures": {1, num_gates},
        }
        for name, sizes in allowed.items():
            if (size := len(getattr(self, name))) not in sizes:
                raise ValueError(
                    f"exit policy: got {size} {name}, expected one of {sorted(sizes)} "
                    f"for {num_gates} exits"
                )

    def threshold(self, exit_index: int) -> float:
        """Threshold of one exit."""
        return self.thresholds[exit_index if len(self.thresholds) > 1 else 0]

    def temperature(self, exit_index: int) -> float:
        """Temperature of the head of one exit; the final head is number G."""
        if len(self.temperatures) == 1:
            return self.temperatures[0]
        return self.temperatures[exit_index] if exit_index < len(self.temperatures) else 1.0

    def _score(
        self, exit_index: int, logits: Tensor, gate_logit: Tensor | None, state: dict[str, Tensor]
    ) -> Tensor:
        """Scores ``(N,)`` at one exit, in both passes; ``state`` goes on to the next exit."""
        if self.needs_gates:
            if gate_logit is None:
                raise ValueError(f"exit policy {self.kind!r}: got no gate logits, expected (N,)")
            few = len(self.gate_temperatures) == 1
            gate_temperature = self.gate_temperatures[0 if few else exit_index]
            g = torch.sigmoid(divided(as_float(gate_logit), gate_temperature))
            if self.kind == "gate":
                return g
            # Both running sums telescope: sum_{j<l} p_j = min(1, sum_{j<l} g_j).
            used = state.get("used")
            left = (1 - used).clamp_min(0) if used is not None else torch.ones_like(g)
            state["used"] = g if used is None else used + g
            share = torch.minimum(g, left) / left.clamp_min(torch.finfo(g.dtype).tiny)
            return torch.where(left > 0, share, torch.ones_like(g))
        if self.kind == "patience":
            predicted = logits.argmax(dim=-1)
            before = state.get("predicted")
            if before is None:
                count = torch.zeros_like(predicted)
            else:
                count = torch.where(predicted == before, state["count"] + 1, 0)
            state["predicted"], state["count"] = predicted, count
            return count.to(torch.float32)
        scaled = divided(as_float(logits), self.temperature(exit_index))
        if self.kind == "entropy":
            return 1 - entropy_from_logits(scaled) / math.log(max(scaled.shape[-1], 2))
        p = torch.softmax(scaled, dim=-1)
        if self.kind == "max_prob" or p.shape[-1] == 1:
            return p.amax(dim=-1)
        top = p.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]

    def leave(
        self,
        exit_index: int,
        logits: Tensor,
        gate_logit: Tensor | None,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Who leaves at this exit, among the samples that are still in.

        Args:
            exit_index: 0 to G-1, in this order, none left out.
            logits: ``(N, K)`` of this exit's head.
            gate_logit: ``(N,)`` of this exit's gate; not looked at (may be None) unless
                ``needs_gates``.
            state: an empty dict at the first exit, then the same dict; changed in place. Keep only
                the rows of the samples that stay with :func:`keep_rows`.

        Returns:
            bool ``(N,)``, on the device of the logits.
        """
        return self._score(exit_index, logits, gate_logit, state) >= self.threshold(exit_index)

    def scores(
        self,
        logits: Sequence[Tensor] | Tensor | np.ndarray,
        gate_logits: Tensor | np.ndarray | None = None,
    ) -> Tensor:
        """Scores ``(N, G)`` of a full pass. They depend on no threshold: sweep over them.

        Args:
            logits: G+1 of ``(N, K)``, or one array ``(G+1, N, K)``.
            gate_logits: ``(N, G)``.
        """
        logits = [torch.as_tensor(z) for z in logits]
        num_gates = len(logits) - 1
        self.check(num_gates)
        if self.needs_gates:
            if gate_logits is None:
                raise ValueError(f"exit policy {self.kind!r}: got no gate logits, expected (N, G)")
            gate_logits = torch.as_tensor(gate_logits)
            if tuple(gate_logits.shape) != (logits[0].shape[0], num_gates):
                raise ValueError(
                    f"gate logits: got shape {tuple(gate_logits.shape)}, "
                    f"expected {(logits[0].shape[0], num_gates)}"
                )
        state: dict[str, Tensor] = {}
        columns = [
            self._score(
                index, logits[index], gate_logits[:, index] if self.needs_gates else None, state
            )
            for index in range(num_gates)
        ]
        if not columns:
            return torch.zeros(logits[0].shape[0], 0, device=logits[0].device)
        return torch.stack(columns, dim=1)

    def select(
        self,
        logits: Sequence[Tensor] | Tensor | np.ndarray,
        gate_logits: Tensor | np.ndarray | None = None,
    ) -> Tensor | np.ndarray:
        """Where each sample of a full pass leaves: int64 ``(N,)`` in 0..G (G is the final head).

        Arguments as for :meth:`scores`; NumPy in, NumPy out.
        """
        chosen = first_reached(self.scores(logits, gate_logits), self.thresholds)
        return chosen.numpy() if isinstance(logits[0], np.ndarray) else chosen

    def probabilities(
        self, logits: Sequence[Tensor] | Tensor | np.ndarray, exit_index: Tensor | np.ndarray
    ) -> Tensor | np.ndarray:
        """Calibrated softmax ``(N, K)`` of the head at which each sample left.

        Args:
            logits: G+1 of ``(N, K)``, of a full pass.
            exit_index: ``(N,)`` in 0..G, from :meth:`select`.
        """
        stacked = torch.stack([torch.as_tensor(z) for z in logits])  # (G+1, N, K)
        self.check(stacked.shape[0] - 1)
        index = torch.as_tensor(exit_index, device=stacked.device)
        chosen = as_float(stacked[index, torch.arange(stacked.shape[1], device=stacked.device)])
        temperature = chosen.new_tensor([self.temperature(i) for i in range(stacked.shape[0])])
        p = torch.softmax(chosen / temperature[index].unsqueeze(1), dim=-1)
        return p.numpy() if isinstance(logits[0], np.ndarray) else p

    def state_dict(self) -> dict:
        """Plain JSON that :meth:`from_state` turns back into an equal policy."""
        return {
            "version": STATE_VERSION,
            "kind": self.kind,
            "thresholds": list(self.thresholds),
            "temperatures": list(self.temperatures),
            "gate_temperatures": list(self.gate_temperatures),
        }

    @classmethod
    def from_state(cls, state: dict | str) -> "ExitPolicy":
        """Rebuild from :meth:`state_dict`, or from its JSON text.

        Raises:
            ValueError: another version, a missing or unknown entry, a bad value.
        """
        if isinstance(state, str):
            state = json.loads(state)
        wanted = {"version", "kind", "thresholds", "temperatures", "gate_temperatures"}
        if not isinstance(state, dict) or set(state) != wanted:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"exit policy: got entries {got}, expected {sorted(wanted)}")
        if state["version"] != STATE_VERSION:
            raise ValueError(
                f"exit policy: got version {state['version']!r}, expected {STATE_VERSION}"
            )
        return cls(**{name: state[name] for name in wanted - {"version"}})


def exit_probabilities(gates: Tensor) -> Tensor:
    """Mass ``(N, G+1)`` that each exit owns, the final head last; rows sum to 1.

    ``p_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`` with the raw gates in the sum, and the final head
    owns what is left. Differentiable in ``gates (N, G)``, which are probabilities (after sigmoid).

    Source: JEI-DNN, arXiv:2310.09163.
    """
    before = gates.cumsum(dim=1) - gates
    mass = torch.minimum(gates, 1 - before).clamp_min(0)
    final = (1 - mass.sum(dim=1, keepdim=True)).clamp_min(0)
    return torch.cat([mass, final], dim=1)


def first_reached(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Index ``(N,)`` of the first column of ``scores (N, G)`` at its threshold; G where none is."""
    n, num_gates = scores.shape
    # Compared in the scores' own dtype, as ``leave`` does: a score equal to the threshold leaves.
    limit = torch.tensor(thresholds, dtype=scores.dtype, device=scores.device)
    reached = scores >= limit
    always = torch.ones(n, 1, dtype=torch.bool, device=scores.device)
    return torch.cat([reached, always], dim=1).to(torch.uint8).argmax(dim=1)


def keep_rows(state: dict[str, Tensor], rows: Tensor) -> None:
    """Keep only ``rows`` (int64 indices) of every entry of an incremental pass's state."""
    for name, value in state.items():
        state[name] = value.index_select(0, rows)


def as_float(x: Tensor) -> Tensor:
    """float32 instead of half precision; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def divided(x: Tensor, temperature: float) -> Tensor:
    """``x / temperature``, or ``x`` itself where that is 1: one operation less at batch 1."""
    return x if temperature == 1 else x / temperature
