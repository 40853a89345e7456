"""The Pareto front: the points that nothing cheaper or equal in cost matches in value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import Integers


def pareto_front(cost: npt.ArrayLike, value: npt.ArrayLike) -> Integers:
    """Indices of the points of the front, by rising cost (and so by rising value).

    A point is left out when another one costs no more and is worth no less, and differs
    in one of the two. Of points equal in both, the first is kept.

    Args:
        cost: (N,), lower is better.
        value: (N,), higher is better.

    Raises:
        ValueError: shapes differ, or NaN.
    """
    costs = np.asarray(cost, dtype=np.float64)
    values = np.asarray(value, dtype=np.float64)
    if costs.ndim != 1 or costs.shape != values.shape:
        raise ValueError(f"cost and value have shapes {costs.shape}, {values.shape}, not (N,)")
    if np.isnan(costs).any() or np.isnan(values).any():
        raise ValueError("cost or value holds NaN, expected numbers")
    order = np.lexsort((-values, costs))  # by cost, the best value of equal costs first
    best = np.maximum.accumulate(values[order])
    better = np.ones(len(order), bool)
    better[1:] = values[order][1:] > best[:-1]
    return order[better].astype(np.int64)
