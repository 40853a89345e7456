"""The rule of early exits on tensors; what a rule is, and how ties are decided, says the core's."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gfnet_dynn.models.gates import entropy_from_logits
from shared_core.deploy import exit_policy as core

NEVER = 1000.0  # reached by no score: probabilities end at 1, patience counts exits
ALWAYS = -1.0  # reached by every score

Array = TypeVar("Array", Tensor, np.ndarray)


class ExitPolicy(core.ExitPolicy):
    """The core's rule, asked with tensors on any device: same fields, same JSON, same decisions.

    Scores are computed in float64, then score and threshold are rounded to float32, as the core
    does in NumPy: a score equal to the threshold leaves, in every pass and every runtime.
    """

    def with_thresholds(self, thresholds: float | Sequence[float]) -> "ExitPolicy":
        """The same rule with other thresholds."""
        return ExitPolicy(self.kind, thresholds, self.temperatures)

    def all_leave_at(self, index: int, num_gates: int) -> "ExitPolicy":
        """The same rule, asked at every exit up to number ``index`` (G: the final head), where
        everybody leaves."""
        thresholds = [ALWAYS if i == index else NEVER for i in range(num_gates)]
        return self.with_thresholds(thresholds or NEVER)

    def _score(
        self, exit_index: int, logits: Tensor, gate_logit: Tensor | None, state: dict[str, Tensor]
    ) -> Tensor:
        """Scores, float32 ``(N,)``, at one exit; ``state`` goes on to the next exit."""
        if self.needs_gates:
            if gate_logit is None:
                raise ValueError(f"exit policy {self.kind!r}: got no gate logits, expected (N,)")
            g = torch.sigmoid(gate_logit.double())
            if self.kind == "gate":
                return g.float()
            # Both running sums telescope: sum_{j<l} p_j = min(1, sum_{j<l} g_j).
            used = state.get("used")
            left = (1 - used).clamp_min(0) if used is not None else torch.ones_like(g)
            state["used"] = g if used is None else used + g
            share = torch.minimum(g, left) / torch.where(left > 0, left, torch.ones_like(left))
            return torch.where(left > 0, share, torch.ones_like(g)).float()
        if self.kind == "patience":
            predicted = logits.argmax(dim=-1)
            before = state.get("predicted")
            if before is None:
                count = torch.zeros_like(predicted)
            else:
                count = torch.where(predicted == before, state["count"] + 1, 0)
            state["predicted"], state["count"] = predicted, count
            return count.float()
        scaled = logits.double() / self.temperature(exit_index)
        if self.kind == "entropy":
            return (1 - entropy_from_logits(scaled) / math.log(max(scaled.shape[-1], 2))).float()
        p = torch.softmax(scaled, dim=-1)
        if self.kind == "max_prob" or p.shape[-1] == 1:
            return p.amax(dim=-1).float()
        top = p.topk(2, dim=-1).values
        return (top[..., 0] - top[..., 1]).float()

    def leave(
        self,
        exit_index: int,
        logits: Tensor,
        gate_logit: Tensor | None,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Who leaves at this exit, among the samples that are still in: bool ``(N,)``.

        Args:
            exit_index: 0 to G-1, in this order, none left out.
            logits: ``(N, K)`` of this exit's head.
            gate_logit: ``(N,)`` of this exit's gate; not looked at (may be None) unless
                ``needs_gates``.
            state: an empty dict at the first exit, then the same dict; changed in place. Keep only
                the rows of the samples that stay with :func:`keep_rows`.
        """
        # A Python number is rounded to the tensor's float32.
        return self._score(exit_index, logits, gate_logit, state) >= self.threshold(exit_index)

    def scores(
        self,
        logits: Sequence[Tensor] | Tensor | np.ndarray,
        gate_logits: Tensor | np.ndarray | None = None,
    ) -> Tensor:
        """Scores, float32 ``(N, G)``, of a full pass. They depend on no threshold: sweep over them.

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
        scores = self.scores(logits, gate_logits)
        as_numpy = isinstance(logits[0], np.ndarray)
        return first_reached(scores.numpy() if as_numpy else scores, self.thresholds)


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


def first_reached(scores: Array, thresholds: float | Sequence[float] | np.ndarray) -> Array:
    """Index ``(N,)`` of the first column of ``scores (N, G)`` at its threshold; G where none is.

    Args:
        scores: of torch or NumPy; so is the answer, int64.
        thresholds: one for all exits, or ``(G,)``; both are compared as float32.
    """
    values = torch.as_tensor(scores).float()
    limit = torch.from_numpy(np.atleast_1d(np.asarray(thresholds, dtype=np.float32)))
    always = torch.ones(len(values), 1, dtype=torch.bool, device=values.device)
    reached = torch.cat([values >= limit.to(values.device), always], dim=1)
    first = reached.to(torch.uint8).argmax(dim=1)
    return first.numpy() if isinstance(scores, np.ndarray) else first


def keep_rows(state: dict[str, Tensor], rows: Tensor) -> None:
    """Keep only ``rows`` (int64 indices) of every entry of an incremental pass's state."""
    for name, value in state.items():
        state[name] = value.index_select(0, rows)
