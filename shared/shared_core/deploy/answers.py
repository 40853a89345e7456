"""What a model says about one image: for people a line, for programs plain JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.deploy.inputs import Source
from shared_core.deploy.predictor import Outputs, Predictor
from shared_core.texts import printable

UNKNOWN = "unknown"  # the answer where the best class stays below the model's threshold


@dataclass(frozen=True)
class Answer:
    """What the model says about one image, or why it says nothing.

    Attributes:
        source: the image.
        label: the best class, or ``unknown``; None with an error, or of a model without classes.
        ranked: class names with their probabilities, the best first.
        values: all probabilities ``(K,)``, or the feature ``(D,)``.
        exit_index: 0..G, the final head is G; None of a network without exits.
        exit_name: of that exit, as people know it.
        macs: multiply-accumulate operations that it cost, where the model says so.
        ms: its share of the time of its batch, without decoding.
    """

    source: Source
    label: str | None = None
    ranked: tuple[tuple[str, float], ...] = ()
    values: npt.NDArray[Any] | None = None
    exit_index: int | None = None
    exit_name: str | None = None
    macs: float | None = None
    ms: float = 0.0

    @property
    def error(self) -> str | None:
        """Why there is no answer."""
        return self.source.error

    @property
    def name(self) -> str:
        """The path, with the number of a frame, on one line that can be printed."""
        frame = self.source.frame
        name = printable(self.source.path)
        return name if frame is None else f"{name} frame {frame}"

    def as_json(self, *, every_class: bool = False) -> dict[str, Any]:
        """Plain JSON: an answer, or ``path`` with ``error``."""
        row: dict[str, Any] = {"path": self.source.path}
        if self.source.frame is not None:
            row["frame"] = self.source.frame
        if self.values is None:
            return {**row, "error": self.error}
        if not self.ranked:
            return {**row, "feature": self.values.tolist(), "ms": self.ms}
        row |= {"class": self.label, "probability": self.ranked[0][1]}
        row["top"] = [{"class": name, "probability": p} for name, p in self.ranked]
        if every_class:
            row["probabilities"] = self.values.tolist()
        if self.exit_index is not None:
            row |= {"exit_index": self.exit_index, "exit": self.exit_name}
        if self.macs is not None:
            row["macs"] = self.macs
        return {**row, "ms": self.ms}


def make_answer(
    predictor: Predictor, source: Source, outputs: Outputs, row: int, *, top: int, ms: float = 0.0
) -> Answer:
    """The answer for row ``row`` of a batch's outputs."""
    values = outputs.values[row]
    index = None if outputs.exits is None else int(outputs.exits[row])
    name, macs = predictor.exit_name(index), predictor.macs(index)
    names = predictor.facts.class_names
    if predictor.facts.task != "classify":
        return Answer(source, None, (), values, index, name, macs, ms)
    best = np.argsort(-values, kind="stable")[:top]  # ties by number
    ranked = tuple((names[k], float(values[k])) for k in best)
    limit = predictor.facts.unknown_threshold
    label = UNKNOWN if limit is not None and ranked[0][1] < limit else ranked[0][0]
    return Answer(source, label, ranked, values, index, name, macs, ms)


def text_line(answer: Answer) -> str:
    """``path: class 0.9876, class 0.0100  exit block 3``."""
    if answer.values is not None and not answer.ranked:
        norm = float(np.linalg.norm(answer.values))
        return f"{answer.name}: a feature of {len(answer.values)} numbers, length {norm:.4f}"
    parts = ", ".join(f"{printable(label)} {p:.4f}" for label, p in answer.ranked)
    if answer.label == UNKNOWN:
        parts = f"{UNKNOWN} ({parts})"
    return f"{answer.name}: {parts}" + (f"  exit {answer.exit_name}" if answer.exit_name else "")
