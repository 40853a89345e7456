"""Numbers over seeds: mean and deviation, and the paired difference of two methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import Floats


@dataclass(frozen=True)
class Summary:
    """Mean and sample deviation (ddof = 1) of n runs; no deviation of a single run."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``a - b`` over seeds that both ran, with its Student t interval."""

    mean: float
    std: float  # sample deviation (ddof = 1) of the differences
    n: int
    low: float  # ends of the confidence interval
    high: float
    wins: int  # seeds on which a is greater than b


def summarize(values: npt.ArrayLike) -> Summary:
    """Mean, sample standard deviation and number of the runs' values, shape (n,)."""
    runs = _runs(values, least=1)
    std = float(runs.std(ddof=1)) if len(runs) > 1 else None
    return Summary(float(runs.mean()), std, len(runs))


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, *, confidence: float = 0.95
) -> PairedDifference:
    """The difference ``a - b`` of two methods run on the same seeds.

    Args:
        a: (n,), one value for each seed, n of at least 2.
        b: (n,), the same seeds in the same order.
        confidence: of the two-sided t interval, in (0, 1).
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a fraction in (0, 1)")
    first, second = _runs(a, least=2), _runs(b, least=2)
    if first.shape != second.shape:
        raise ValueError(f"got {len(first)} and {len(second)} runs, expected the same seeds")
    gaps = first - second
    mean, std = float(gaps.mean()), float(gaps.std(ddof=1))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(gaps) - 1)) * std / math.sqrt(len(gaps))
    wins = int((gaps > 0).sum())
    return PairedDifference(mean, std, len(gaps), mean - reach, mean + reach, wins)


def _runs(values: npt.ArrayLike, *, least: int) -> Floats:
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or len(runs) < least:
        raise ValueError(f"runs have shape {runs.shape}, expected (n,) with n of at least {least}")
    if not np.isfinite(runs).all():
        raise ValueError("runs hold NaN or infinity, expected numbers")
    return runs
