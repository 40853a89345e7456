"""Runs a network with early exits that was written as a chain of ONNX segments.

A segment ends at an exit. ONNX Runtime runs it, the policy decides, and only the images that are
left go into the next segment: what an easy image saves is really saved, at any batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shared_core.deploy.exit_policy import ExitPolicy, keep_rows

LOGITS, GATE = "logits", "gate_logit"  # outputs by name; all others go on to the next segment


class Session(Protocol):
    """What is used of an ONNX Runtime session."""

    def get_inputs(self) -> Sequence[Any]:
        """Described inputs, each with a ``name``."""

    def get_outputs(self) -> Sequence[Any]:
        """Described outputs, each with a ``name``."""

    def run(self, names: Sequence[str] | None, feed: dict[str, Any]) -> Sequence[Any]:
        """The outputs for these inputs."""


class ExitChain:
    """A chain of segments with real exits.

    The first segment takes uint8 images ``(N, H, W, 3)``. Each gives ``logits (N, K)`` of its head;
    all but the last may give ``gate_logit (N,)``, and what else they give are the next segment's
    inputs, in this order.

    Raises:
        ValueError: no segments, or segments that do not fit each other.
    """

    def __init__(self, segments: Sequence[Session]) -> None:
        if not segments:
            raise ValueError("a chain of no segments, expected at least one")
        self._segments = list(segments)
        self._inputs = [[one.name for one in part.get_inputs()] for part in segments]
        self._outputs = [[one.name for one in part.get_outputs()] for part in segments]
        self._carried = [
            [name for name in names if name not in (LOGITS, GATE)] for names in self._outputs
        ]
        for number, names in enumerate(self._outputs):
            if LOGITS not in names:
                raise ValueError(f"segment {number} gives {names}, expected {LOGITS!r} among them")
        for number, taken in enumerate(self._inputs[1:]):
            if len(taken) != len(self._carried[number]):
                raise ValueError(
                    f"segment {number} hands on {self._carried[number]}, but segment {number + 1} "
                    f"takes {taken}"
                )

    @property
    def num_exits(self) -> int:
        """Exits before the final head."""
        return len(self._segments) - 1

    @property
    def has_gates(self) -> bool:
        """Whether every exit has a learned gate."""
        return all(GATE in names for names in self._outputs[:-1])

    def __call__(
        self, images: npt.NDArray[np.uint8], policy: ExitPolicy
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Logits ``(N, K)`` of the head at which each image left, and exits ``(N,)`` in 0..G.

        Args:
            images: uint8 ``(N, H, W, 3)``, N at least 1.

        Raises:
            ValueError: a policy for another number of exits, or for gates that are not there.
        """
        policy.check(self.num_exits)
        out: npt.NDArray[np.float32] | None = None
        exits = np.full(len(images), self.num_exits, np.int64)
        rows = np.arange(len(images))
        values: list[Any] = [images]
        state: dict[str, Any] = {}
        for index, segment in enumerate(self._segments):
            feed = dict(zip(self._inputs[index], values, strict=True))
            found = dict(zip(self._outputs[index], segment.run(None, feed), strict=True))
            logits = found[LOGITS]
            if out is None:
                out = np.empty((len(images), logits.shape[-1]), np.float32)
            if index == self.num_exits:
                out[rows] = logits
                break
            leaving = policy.leave(index, logits, found.get(GATE), state)
            out[rows[leaving]], exits[rows[leaving]] = logits[leaving], index
            stay = np.flatnonzero(~leaving)
            if not len(stay):
                break
            values = [found[name] for name in self._carried[index]]
            if len(stay) < len(rows):
                rows, values = rows[stay], [value[stay] for value in values]
                keep_rows(state, stay)
        assert out is not None
        return out, exits
