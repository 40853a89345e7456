"""Who leaves a network with early exits where: one rule, in NumPy, for every runtime.

Each kind gives a sample a score at each exit; the sample leaves at the first exit whose score
reaches that exit's threshold, and at the final head when none does. Labels never enter.

The rule on ties, the same in every framework: scores are computed in float64 from the exit's
logits, then score and threshold are both rounded to float32, and a score equal to the threshold
leaves. So neither the order of a sum nor the processor's exponential decides where a sample goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.deploy.options import EXIT_KINDS

KINDS = EXIT_KINDS
STATE_VERSION = 1
NEVER = 1000.0  # a threshold that no score reaches, nor a count of exits

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
_ENTRIES = ("thresholds", "temperatures")


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
        thresholds: one for all exits, or one an exit (the final head has none). More than 1 never
            leaves (``patience``: more than the exits can count).
        temperatures: divide the logits of the heads before max_prob, entropy, margin and
            :meth:`probabilities`; one for all, one an exit, or one more for the final head (1 if it
            is left out). They do not touch the gates, which saw raw logits when they were trained.

    Raises:
        ValueError: an unknown kind, numbers that are not finite, a temperature of 0 or less.

    Source: JEI-DNN, arXiv:2310.09163 (gate, jei); BranchyNet, arXiv:1709.01686 (entropy); PABEE,
    arXiv:2006.04152 (patience).
    """

    kind: str = "gate"
    thresholds: float | Sequence[float] = 0.5
    temperatures: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"exit policy: got kind {self.kind!r}, expected one of {KINDS}")
        for name in _ENTRIES:
            try:
                values = np.atleast_1d(np.asarray(getattr(self, name), dtype=np.float64))
            except (TypeError, ValueError):
                values = np.array([np.nan])
            if values.ndim != 1 or not values.size or not np.isfinite(values).all():
                raise ValueError(
                    f"exit policy: got {name} {getattr(self, name)!r}, expected finite numbers"
                )
            if name != "thresholds" and values.min() <= 0:
                raise ValueError(f"exit policy: got {name} {values.tolist()}, expected > 0")
            object.__setattr__(self, name, tuple(values.tolist()))

    @classmethod
    def never(cls) -> ExitPolicy:
        """The policy under which every sample runs to the final head."""
        return cls("max_prob", NEVER)

    @property
    def needs_gates(self) -> bool:
        """Whether the scores are made from gate logits."""
        return self.kind in ("gate", "jei")

    def _values(self, name: str) -> tuple[float, ...]:
        values: tuple[float, ...] = getattr(self, name)
        return values

    def check(self, num_exits: int) -> None:
        """Raise a ValueError unless thresholds and temperatures fit ``num_exits`` exits."""
        allowed = {
            "thresholds": {1, num_exits},
            "temperatures": {1, num_exits, num_exits + 1},
        }
        for name, sizes in allowed.items():
            if (size := len(self._values(name))) not in sizes:
                raise ValueError(
                    f"exit policy: got {size} {name}, expected one of {sorted(sizes)} "
                    f"for {num_exits} exits"
                )

    def threshold(self, exit_index: int) -> float:
        """Threshold of one exit."""
        values = self._values("thresholds")
        return values[exit_index if len(values) > 1 else 0]

    def temperature(self, exit_index: int) -> float:
        """Temperature of the head of one exit; the final head is number G."""
        values = self._values("temperatures")
        if len(values) == 1:
            return values[0]
        return values[exit_index] if exit_index < len(values) else 1.0

    def leave(
        self,
        exit_index: int,
        logits: Array,
        gate_logit: Array | None,
        state: dict[str, Array],
    ) -> npt.NDArray[np.bool_]:
        """Who leaves at this exit, among the samples that are still in: bool ``(N,)``.

        Args:
            exit_index: 0 to G-1, in this order, none left out.
            logits: ``(N, K)`` of this exit's head.
            gate_logit: ``(N,)`` of this exit's gate; may be None unless ``needs_gates``.
            state: an empty dict at the first exit, then the same dict; changed in place. Keep only
                the rows of the samples that stay with :func:`keep_rows`.
        """
        score = self._score(exit_index, logits, gate_logit, state)
        reached: npt.NDArray[np.bool_] = score >= np.float32(self.threshold(exit_index))
        return reached

    def _score(
        self,
        exit_index: int,
        logits: Array,
        gate_logit: Array | None,
        state: dict[str, Array],
    ) -> npt.NDArray[np.float32]:
        """Scores ``(N,)`` at one exit; ``state`` goes on to the next exit."""
        if self.needs_gates:
            if gate_logit is None:
                raise ValueError(f"exit policy {self.kind!r}: got no gate logits, expected (N,)")
            return self._gate_score(gate_logit, state).astype(np.float32)
        if self.kind == "patience":
            predicted = np.argmax(logits, axis=-1)
            before = state.get("predicted")
            count: Array = np.zeros_like(predicted)
            if before is not None:
                count = np.where(predicted == before, state["count"] + 1, 0)
            state["predicted"], state["count"] = predicted, count
            return count.astype(np.float32)
        return self._certainty(softmax(logits, self.temperature(exit_index))).astype(np.float32)

    def _certainty(self, p: Floats) -> Floats:
        """Scores ``(N,)`` of probabilities ``(N, K)``."""
        certainty: Floats
        if self.kind == "entropy":
            terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0.0)
            certainty = 1 + terms.sum(axis=-1) / math.log(max(p.shape[-1], 2))
        elif self.kind == "max_prob" or p.shape[-1] == 1:
            certainty = p.max(axis=-1)
        else:
            top = np.partition(p, -2, axis=-1)
            certainty = top[..., -1] - top[..., -2]
        return certainty

    def _gate_score(self, gate_logit: Array, state: dict[str, Array]) -> Floats:
        x = np.asarray(gate_logit, np.float64)
        small = np.exp(-np.abs(x))  # no overflow on either side
        g: Floats = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
        if self.kind == "gate":
            return g
        # Both running sums telescope: sum_{j<l} p_j = min(1, sum_{j<l} g_j).
        used = state.get("used", np.zeros_like(g))
        left = np.maximum(1 - used, 0)
        state["used"] = used + g
        return np.where(left > 0, np.minimum(g, left) / np.where(left > 0, left, 1), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON that :meth:`from_state` turns back into an equal policy."""
        values = {name: list(self._values(name)) for name in _ENTRIES}
        return {"version": STATE_VERSION, "kind": self.kind, **values}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ExitPolicy:
        """Rebuild from :meth:`state_dict`.

        Raises:
            ValueError: another version, a missing or unknown entry, a bad value.
        """
        wanted = {"version", "kind", *_ENTRIES}
        got = set(state) if isinstance(state, Mapping) else {type(state).__name__}
        # States once held temperatures of the gates, which nothing ever set.
        if got - {"gate_temperatures"} != wanted or set(state.get("gate_temperatures", [1])) != {1}:
            raise ValueError(f"exit policy: got entries {sorted(got)}, expected {sorted(wanted)}")
        if state["version"] != STATE_VERSION:
            raise ValueError(
                f"exit policy: got version {state['version']!r}, expected {STATE_VERSION}"
            )
        return cls(state["kind"], *(state[name] for name in _ENTRIES))


def softmax(logits: Array, temperature: float | Array = 1.0) -> Floats:
    """Softmax of ``logits (N, K)`` divided by ``temperature``, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers: Floats = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def keep_rows(state: dict[str, Array], rows: npt.NDArray[np.integer]) -> None:
    """Keep only ``rows`` (indices) of every entry of a pass's state."""
    for name, value in state.items():
        state[name] = value[rows]
