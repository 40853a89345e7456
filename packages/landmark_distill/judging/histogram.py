"""The original's verification rate: a histogram of 2,000 bins, kept beside the exact one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.images.truths import PairTruth, Truth

BINS = 2000
SHIFT = 2e-6  # what the original moves its edges by
HOPELESS = 8  # a bin whose FAR is so many times the target gives a rate of 0


def histogram_rates(
    features: NDArray[Any],
    truths: Mapping[str, Truth],
    *,
    far_targets: Sequence[float],
    bins: int = BINS,
    block: int = 1024,
) -> dict[str, tuple[list[float], int]]:
    """Verification rates as the original computes them, in blocks instead of all pairs at once.

    With ``u = (max - min) / bins``, bin k begins at ``min + u k - u / 2 + 2e-6``; FAR and rate of
    a bin are the shares of impostor and genuine pairs in it and above. A target that falls between
    two bins gets the mean of their rates, or 0 where the upper FAR is 8 targets or more. The
    exact rate (:mod:`landmark_distill.judging.verification`) needs none of this; the two differ by
    what a bin holds. Scores are float32 here, float16 in the original.

    Args:
        features: (N, D); scaled to unit length.
        truths: name -> labels (N,) or a mask.

    Returns:
        For each truth the rates, rounded to five digits, and how many impostor pairs there are.
    """
    rows = _unit(features)
    sources = {name: PairTruth(name, truth, len(rows)) for name, truth in truths.items()}
    low, high = _range(rows, block)
    unit = (high - low) / bins
    edges = low + unit * np.arange(1, bins + 2) - unit / 2 + SHIFT
    counts = {name: np.zeros((2, bins), np.int64) for name in sources}
    for first, second, scores, cells in _blocks(rows, block):
        for name, truth in sources.items():
            if first.start == second.start:
                truth.next_rows()
            genuine = truth.block(first, second)
            if genuine is None:
                genuine = np.zeros(scores.shape, bool)
            for kind, chosen in enumerate((genuine, ~genuine)):
                values = scores[chosen & cells if cells is not None else chosen]
                counts[name][kind] += np.histogram(values, edges)[0]
    return {
        name: (_rates(counts[name], (truth.genuine, truth.impostor), far_targets), truth.impostor)
        for name, truth in sources.items()
    }


def _unit(features: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.array(features, dtype=np.float32, order="C")
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"features have shape {rows.shape}, expected finite (N, D)")
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    rows /= np.where(lengths == 0, 1, lengths)
    return rows


def _range(rows: NDArray[np.float32], block: int) -> tuple[float, float]:
    """The least and the greatest score of all pairs."""
    low, high = np.inf, -np.inf
    for _first, _second, scores, cells in _blocks(rows, block):
        values = scores[cells] if cells is not None else scores
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _blocks(rows: NDArray[np.float32], block: int) -> Any:
    for i in range(0, len(rows), block):
        for j in range(i, len(rows), block):
            first, second = (slice(s, min(s + block, len(rows))) for s in (i, j))
            scores = rows[first] @ rows[second].T
            yield first, second, scores, np.triu(np.ones_like(scores, bool), 1) if i == j else None


def _rates(
    counts: NDArray[np.int64], totals: tuple[int, int], targets: Sequence[float]
) -> list[float]:
    reach = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    rate, far = reach[0] / totals[0], reach[1] / totals[1]
    found = []
    for target in targets:
        # far falls with k: the last bin at or above the target, and the next one.
        upper = int(np.searchsorted(-far, -target, side="right")) - 1
        if upper >= 0 and far[upper] == target:
            value = rate[upper]
        elif upper < 0:  # even the first bin is below the target
            value = rate[0]
        elif upper + 1 >= len(far) or far[upper] / target >= HOPELESS:
            value = 0.0
        else:
            value = (rate[upper] + rate[upper + 1]) / 2
        found.append(round(float(value), 5))
    return found
