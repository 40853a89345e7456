"""Checked arrays: what the metrics accept as labels, scores and probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def as_labels(values: npt.ArrayLike, *, num_classes: int | None = None) -> Integers:
    """Class numbers as int64, shape ``(N,)``, each in ``[0, num_classes)``.

    Raises:
        ValueError: another shape, not whole numbers, or out of range.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"labels have shape {array.shape}, expected (N,)")
    if array.dtype.kind not in "iub" and array.size:
        raise ValueError(f"labels have dtype {array.dtype}, expected integers")
    labels = array.astype(np.int64)
    if labels.size and labels.min() < 0:
        raise ValueError(f"labels hold {labels.min()}, expected values of at least 0")
    if num_classes is not None and labels.size and labels.max() >= num_classes:
        raise ValueError(f"labels hold {labels.max()}, expected values below {num_classes}")
    return labels


def as_scores(values: npt.ArrayLike, *, rows: int | None = None) -> Floats:
    """Logits or probabilities as float64, shape ``(N, C)``, without NaN.

    Raises:
        ValueError: another shape, another number of rows than ``rows``, or NaN.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores have shape {scores.shape}, expected (N, C) with C of at least 1")
    if rows is not None and len(scores) != rows:
        raise ValueError(f"scores have {len(scores)} rows, expected one for each of {rows} labels")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN, expected numbers")
    return scores


def as_probabilities(values: npt.ArrayLike, *, rows: int | None = None) -> Floats:
    """Class probabilities as float64, shape ``(N, C)``: in [0, 1], each row summing to 1.

    Rows may miss 1 by 1e-3, as float16 probabilities do; they are not rescaled.

    Raises:
        ValueError: as ``as_scores``, or not probabilities.
    """
    probs = as_scores(values, rows=rows)
    if probs.size == 0:
        return probs
    if probs.min() < 0 or probs.max() > 1 + 1e-6:
        raise ValueError(
            f"probabilities span {probs.min():.6g} to {probs.max():.6g}, expected [0, 1]"
        )
    gap = float(np.abs(probs.sum(axis=1) - 1).max())
    if gap > 1e-3:
        raise ValueError(f"a row of probabilities misses a sum of 1 by {gap:.3g}, expected 1e-3")
    return probs


def not_empty(count: int) -> None:
    """Refuse a metric over no samples, which has no value."""
    if count == 0:
        raise ValueError("got 0 samples, expected at least 1")
