"""Open-set verification: the share of genuine pairs accepted at given false-accept rates.

All ``N (N - 1) / 2`` pairs of features are scored, block by block, and no matrix of scores is kept:
37,649 features have 709 million pairs. Thresholds are exact, those of the pairs' scores in float64:
``scan_search`` finds them in one sweep, ``radix_search`` where that cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from landmark_distill.config import FAR_TARGETS
from landmark_distill.images.truths import PairMask, PairTruth
from landmark_distill.judging.radix_search import allowed, radix_search
from landmark_distill.judging.scan_search import scan_search
from shared_core.metrics.arrays import Floats

FEW_PAIRS = 1 << 20  # below, a sample is not worth taking


@dataclass(frozen=True)
class Verification:
    """What :func:`verification_rates` found of one truth, a value for each target; shapes (T,)."""

    far_targets: tuple[float, ...]
    rates: Floats  # genuine pairs accepted / genuine pairs
    thresholds: Floats  # a pair is accepted when its score is greater than this
    far: Floats  # impostor pairs accepted / impostor pairs; never above the target
    genuine: int  # pairs of the same class
    impostor: int  # pairs of different classes


def measurable(far_targets: Sequence[float], impostor: int) -> list[bool]:
    """Whether so many impostor pairs can show a target: it must allow a false accept at least."""
    return [allowed(target, impostor) >= 1 for target in far_targets]


def verification_rates(
    features: npt.ArrayLike,
    truths: Mapping[str, npt.ArrayLike | PairMask],
    *,
    far_targets: Sequence[float] = FAR_TARGETS,
    block: int = 1024,
    normalize: bool = True,
    dtype: npt.DTypeLike = np.float32,
) -> dict[str, Verification]:
    """Verification rate (true-accept rate) at each false-accept rate (FAR), over all pairs.

    A pair is accepted when its score is **greater than** the threshold. For a target ``a``
    and M impostor pairs, ``k = floor(a M)`` false accepts are allowed and the threshold is
    the (k+1)-th largest impostor score: the lowest threshold whose FAR is at most ``a``.
    Impostors that tie with it are all rejected, so the reached FAR may be lower. With
    ``k >= M`` everything is accepted (threshold -inf).

    Args:
        features: (N, D), finite.
        truths: name -> class of each sample (N,), or a ``PairMask``; several cost as much as one.
        far_targets: fractions in [0, 1], any order.
        block: rows and columns scored at a time; memory grows with its square.
        normalize: scale each feature to length 1, so that scores are cosines; a zero
            feature stays zero. ``False`` takes inner products as they are.
        dtype: float32 or float64, in which the features are kept and the pairs are swept.
            What decides is each pair's score in float64, of features so kept.

    Raises:
        ValueError: shapes do not fit, not finite, no genuine or no impostor pair.
    """
    kind = np.dtype(dtype)
    if kind not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype is {kind}, expected float32 or float64")
    if block < 1:
        raise ValueError(f"block is {block}, expected at least 1")
    if not truths:
        raise ValueError("got no truths, expected at least one")
    targets = tuple(float(t) for t in far_targets)
    if not targets or not all(0 <= t <= 1 for t in targets):
        raise ValueError(f"far_targets are {targets}, expected fractions in [0, 1]")
    rows = _prepared(features, kind, normalize)
    sources = {name: PairTruth(name, truth, len(rows)) for name, truth in truths.items()}
    found = None
    if len(rows) * (len(rows) - 1) // 2 > FEW_PAIRS:
        found = scan_search(rows, sources, targets, block=block)
    if found is None:
        found = radix_search(rows, sources, targets, block=block)
    results = {}
    for name, (genuine, impostor, thresholds) in found.items():
        truth = sources[name]
        results[name] = Verification(
            far_targets=targets,
            rates=np.array(genuine) / truth.genuine,
            thresholds=np.array(thresholds),
            far=np.array(impostor) / truth.impostor,
            genuine=truth.genuine,
            impostor=truth.impostor,
        )
    return results


def _prepared(features: npt.ArrayLike, kind: np.dtype[Any], normalize: bool) -> npt.NDArray[Any]:
    given = np.asarray(features)
    if given.ndim != 2 or len(given) < 2:
        raise ValueError(f"features have shape {given.shape}, expected (N, D) with N of at least 2")
    rows = np.array(given, dtype=kind, order="C")  # a copy: it is scaled in place
    for start in range(0, len(rows), 256):  # small parts stay in the cache
        part = rows[start : start + 256]
        if not np.isfinite(part).all():
            raise ValueError("features hold NaN or infinity, expected finite numbers")
        if normalize:
            lengths = np.sqrt(np.square(part, dtype=np.float64).sum(axis=1, keepdims=True))
            part /= np.where(lengths == 0, 1, lengths)
    return rows
