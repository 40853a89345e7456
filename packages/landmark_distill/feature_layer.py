"""First weights of a new feature layer and head that keep, and sharpen, what a trained body knows.

A random layer scrambles the body's features, and few images cannot mend that for classes that
nobody learns. So the layer starts as the map that makes images of one class alike (the within-class
covariance becomes round), the head as the classes' mean directions; beside a teacher the student's
features are turned, as a whole, to where the teacher's lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
SHRINK = 0.3  # share of the round covariance that is mixed in: few images know it badly


class Layer(NamedTuple):
    """``features = rows @ weight.T + bias``: float64 ``(F, D)`` and ``(F,)``."""

    weight: Rows
    bias: Rows

    def __call__(self, rows: Rows) -> Rows:
        """Features ``(N, F)`` of a body's outputs ``(N, D)``."""
        return rows @ self.weight.T + self.bias


def whitening(
    rows: Rows, labels: NDArray[np.int64], *, width: int, shrink: float = SHRINK
) -> Layer:
    """The layer that makes the covariance within classes round, in its ``width`` main directions.

    A layer wider than the body's outputs has zeros in what is left.

    Args:
        rows: outputs of the body ``(N, D)``.
        labels: int64 ``(N,)``.

    Source: Hatch et al. 2006, "Within-class covariance normalization for SVM-based speaker
    recognition"; shrinkage: Ledoit and Wolf 2004.
    """
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(counts), rows.shape[1]))
    np.add.at(means, codes, rows)
    within = rows - (means / counts[:, None])[codes]
    values, axes = np.linalg.eigh(within.T @ within / max(len(rows) - len(counts), 1))
    values = (1 - shrink) * np.maximum(values, 0.0) + shrink * max(values.mean(), 1e-12)
    white = (axes / np.sqrt(values)) @ axes.T  # (D, D)
    centre = rows.mean(axis=0)
    spread = (rows - centre) @ white
    _, main = np.linalg.eigh(spread.T @ spread)
    weight = np.zeros((width, rows.shape[1]))
    kept = main[:, ::-1][:, :width].T @ white
    weight[: len(kept)] = kept / np.sqrt(np.square(kept).mean() * rows.shape[1])
    return Layer(weight, -weight @ centre)


def turned(layer: Layer, rows: Rows, goal: Rows) -> Layer:
    """The layer, its features turned as a whole to lie along ``goal`` ``(N, F)``, row by row.

    Angles between features stay as they are.

    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    left, _, right = np.linalg.svd(unit(layer(rows)).T @ unit(goal))
    turn = left @ right  # (F, F)
    return Layer(turn.T @ layer.weight, layer.bias @ turn)


def class_directions(features: Rows, labels: NDArray[np.int64], *, count: int) -> Rows:
    """Mean directions of the classes, unit rows ``(count, F)``; zeros for a class of no image."""
    sums = np.zeros((count, features.shape[1]))
    np.add.at(sums, labels, unit(features))
    return unit(sums)


def unit(rows: Rows) -> Rows:
    """Rows of length 1; zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
