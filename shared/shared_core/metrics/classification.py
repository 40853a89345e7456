"""Accuracy, confusion and the per-class report, counted batch by batch.

Only whole numbers are kept between batches, so any split of the data into batches or
processes (``merge``) gives exactly the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import Floats, Integers, as_labels, as_scores, not_empty


class TopK:
    """Streaming top-k accuracy.

    A sample counts for ``k`` when fewer than ``k`` classes go before its label. Of equal
    scores the lower class number goes first, so top-1 is the accuracy of ``argmax``.
    """

    def __init__(self, ks: Sequence[int] = (1, 5)) -> None:
        if not ks or any(k < 1 for k in ks):
            raise ValueError(f"ks is {tuple(ks)}, expected numbers of at least 1")
        self.ks = tuple(ks)
        self.count = 0  # samples
        self.hits = {k: 0 for k in self.ks}

    def update(self, scores: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Add a batch: ``scores`` (N, C) of any monotone scale, ``labels`` (N,)."""
        truth = as_labels(labels)
        table = as_scores(scores, rows=len(truth))
        classes = table.shape[1]
        if max(self.ks) > classes:
            raise ValueError(f"k is {max(self.ks)}, expected at most the {classes} classes")
        as_labels(truth, num_classes=classes)
        own = np.take_along_axis(table, truth[:, None], axis=1)
        earlier = np.arange(classes) < truth[:, None]
        before = (table > own).sum(axis=1) + ((table == own) & earlier).sum(axis=1)
        self.count += len(truth)
        for k in self.ks:
            self.hits[k] += int((before < k).sum())

    def merge(self, other: TopK) -> None:
        """Add the counts of another process or part of the data."""
        if self.ks != other.ks:
            raise ValueError(f"cannot merge top-k of {other.ks}, expected {self.ks}")
        self.count += other.count
        for k in self.ks:
            self.hits[k] += other.hits[k]

    def result(self) -> dict[int, float]:
        """Accuracy for each k, a fraction in [0, 1]."""
        not_empty(self.count)
        return {k: hits / self.count for k, hits in self.hits.items()}


class Confusion:
    """Streaming confusion matrix: rows are the true classes, columns the predicted ones."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, expected at least 1")
        self.num_classes = num_classes
        self._matrix = np.zeros((num_classes, num_classes), np.int64)

    def update(self, predicted: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Add a batch: ``predicted`` is class numbers (N,) or scores (N, C)."""
        truth = as_labels(labels, num_classes=self.num_classes)
        array = np.asarray(predicted)
        if array.ndim == 2:
            if array.shape[1] != self.num_classes:
                raise ValueError(f"scores have {array.shape[1]} columns, not {self.num_classes}")
            array = as_scores(array, rows=len(truth)).argmax(axis=1)
        guess = as_labels(array, num_classes=self.num_classes)
        if len(guess) != len(truth):
            raise ValueError(f"got {len(guess)} predictions for {len(truth)} labels")
        cells = np.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self._matrix += cells.reshape(self.num_classes, self.num_classes)

    def merge(self, other: Confusion) -> None:
        """Add the counts of another process or part of the data."""
        if self.num_classes != other.num_classes:
            raise ValueError(
                f"cannot merge a confusion of {other.num_classes} classes into one of "
                f"{self.num_classes}"
            )
        self._matrix += other._matrix

    def result(self) -> Integers:
        """The counts, int64 (C, C); a copy."""
        return self._matrix.copy()


@dataclass(frozen=True)
class PerClass:
    """Scores of each class: fractions in [0, 1], ``support`` in samples; shapes (C,)."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Integers


def accuracy(confusion: npt.ArrayLike) -> float:
    """Fraction of samples on the diagonal of a confusion matrix (C, C)."""
    matrix = _matrix(confusion)
    not_empty(int(matrix.sum()))
    return float(np.trace(matrix) / matrix.sum())


def per_class(confusion: npt.ArrayLike, *, zero_division: float = 0.0) -> PerClass:
    """Precision, recall and F1 of each class of a confusion matrix (rows = true).

    Args:
        confusion: counts, (C, C).
        zero_division: the value where the formula is 0/0: 0, 1 or NaN. Precision is so
            without predictions of a class, recall without samples, F1 without either.
    """
    if not (zero_division in (0.0, 1.0) or np.isnan(zero_division)):
        raise ValueError(f"zero_division is {zero_division}, expected 0, 1 or nan")
    matrix = _matrix(confusion)
    hits = np.diag(matrix).astype(np.float64)
    support = matrix.sum(axis=1)
    predicted = matrix.sum(axis=0)
    return PerClass(
        precision=_divide(hits, predicted, zero_division),
        recall=_divide(hits, support, zero_division),
        f1=_divide(2 * hits, predicted + support, zero_division),
        support=support,
    )


@overload
def classification_report(
    confusion: npt.ArrayLike,
    class_names: Sequence[str] | None = None,
    *,
    output_dict: Literal[False] = False,
    digits: int = 2,
    zero_division: float = 0.0,
) -> str: ...


@overload
def classification_report(
    confusion: npt.ArrayLike,
    class_names: Sequence[str] | None = None,
    *,
    output_dict: Literal[True],
    digits: int = 2,
    zero_division: float = 0.0,
) -> dict[str, Any]: ...


def classification_report(
    confusion: npt.ArrayLike,
    class_names: Sequence[str] | None = None,
    *,
    output_dict: bool = False,
    digits: int = 2,
    zero_division: float = 0.0,
) -> str | dict[str, Any]:
    """The table of scikit-learn's ``classification_report``, from a confusion matrix.

    All classes are listed, also those without samples.

    Args:
        confusion: counts, (C, C), rows = true.
        class_names: C names; the class numbers when absent.
        output_dict: numbers by name instead of text.
        digits: decimals of the text.
        zero_division: see ``per_class``.
    """
    matrix = _matrix(confusion)
    names = [str(i) for i in range(len(matrix))] if class_names is None else list(class_names)
    if len(names) != len(matrix):
        raise ValueError(f"got {len(names)} class names for {len(matrix)} classes")
    scores = per_class(matrix, zero_division=zero_division)
    total = int(matrix.sum())
    rows: dict[str, tuple[float, float, float, float]] = {}
    for i, name in enumerate(names):
        rows[name] = (
            float(scores.precision[i]),
            float(scores.recall[i]),
            float(scores.f1[i]),
            float(scores.support[i]),
        )
    averages: dict[str, tuple[float, float, float, float]] = {}
    for title, weights in (
        ("macro avg", np.ones(len(matrix))),
        ("weighted avg", scores.support.astype(np.float64)),
    ):
        p, r, f = (
            _average(column, weights) for column in (scores.precision, scores.recall, scores.f1)
        )
        averages[title] = (p, r, f, float(total))
    overall = float(np.trace(matrix) / total) if total else zero_division
    if output_dict:
        heads = ("precision", "recall", "f1-score", "support")
        report: dict[str, Any] = {
            name: dict(zip(heads, row, strict=True)) for name, row in rows.items()
        }
        report["accuracy"] = overall
        report.update({k: dict(zip(heads, v, strict=True)) for k, v in averages.items()})
        return report
    width = max([len(name) for name in names] + [len("weighted avg"), digits])
    heads_line = "".join(f" {head:>9}" for head in ("precision", "recall", "f1-score", "support"))

    def line(name: str, row: tuple[float, float, float, float]) -> str:
        numbers = "".join(f" {value:>9.{digits}f}" for value in row[:3])
        return f"{name:>{width}} {numbers} {int(row[3]):>9}"

    lines = [f"{'':>{width}} {heads_line}", ""]
    lines += [line(name, row) for name, row in rows.items()]
    lines += ["", f"{'accuracy':>{width}} {'':>20} {overall:>9.{digits}f} {total:>9}"]
    lines += [line(name, row) for name, row in averages.items()]
    return "\n".join(lines) + "\n"


def _matrix(confusion: npt.ArrayLike) -> Integers:
    matrix = np.asarray(confusion)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"confusion has shape {matrix.shape}, expected (C, C)")
    if matrix.dtype.kind not in "iu" or matrix.min() < 0:
        raise ValueError("confusion holds something else, expected counts of at least 0")
    return matrix.astype(np.int64)


def _divide(top: npt.ArrayLike, bottom: npt.ArrayLike, otherwise: float) -> Floats:
    below = np.asarray(bottom, dtype=np.float64)
    result = np.full(below.shape, otherwise, dtype=np.float64)
    np.divide(np.asarray(top, dtype=np.float64), below, out=result, where=below != 0)
    return result


def _average(values: Floats, weights: Floats) -> float:
    """Weighted mean that leaves out NaN, as scikit-learn's averages do.

    Where all weights are 0 the mean is plain, as theirs is.
    """
    known = ~np.isnan(values)
    if not known.any():
        return float("nan")
    total = float(weights[known].sum())
    if total == 0:
        return float(values[known].mean())
    return float((values[known] * weights[known]).sum() / total)
