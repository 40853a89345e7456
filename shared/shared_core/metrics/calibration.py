"""How far probabilities can be believed: ECE, NLL, Brier, reliability, temperature.

Confidence is the largest probability of a sample; a sample is correct when the class that
has it is its label. Everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import (
    Floats,
    Integers,
    as_labels,
    as_probabilities,
    as_scores,
    not_empty,
)

Scheme = Literal["width", "mass"]


@dataclass(frozen=True)
class Reliability:
    """A reliability curve; shapes (B,), NaN where a bin holds no sample."""

    confidence: Floats  # mean confidence of the bin, fraction in [0, 1]
    accuracy: Floats  # fraction of the bin's samples that are correct
    count: Integers  # samples in the bin


def softmax(logits: npt.ArrayLike, *, temperature: float = 1.0) -> Floats:
    """Probabilities (N, C) of ``logits / temperature``, in float64."""
    return np.asarray(np.exp(log_softmax(logits, temperature=temperature)), dtype=np.float64)


def log_softmax(logits: npt.ArrayLike, *, temperature: float = 1.0) -> Floats:
    """Log-probabilities (N, C) of ``logits / temperature``, in nats; finite logits only."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    table = as_scores(logits)
    if not np.isfinite(table).all():
        raise ValueError("logits hold an infinity, expected finite numbers")
    scaled = (table - table.max(axis=1, keepdims=True)) / temperature
    log_sum = np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return np.asarray(scaled - log_sum, dtype=np.float64)


def nll(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean negative log-likelihood of the labels, in nats; infinite when one has p = 0.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,), values in [0, C).
    """
    table, truth = _checked(probs, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(table[np.arange(len(truth)), truth]).mean())


def nll_from_logits(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, temperature: float = 1.0
) -> float:
    """``nll`` of ``softmax(logits / temperature)``, without underflow."""
    table = log_softmax(logits, temperature=temperature)
    truth = as_labels(labels, num_classes=table.shape[1])
    not_empty(len(truth))
    if len(table) != len(truth):
        raise ValueError(f"got {len(table)} rows of logits for {len(truth)} labels")
    return float(-table[np.arange(len(truth)), truth].mean())


def brier(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Multiclass Brier score, ``mean_i sum_c (p_ic - [c = y_i])^2``, in [0, 2].

    For two classes this is twice ``brier_binary``.

    Source: Brier 1950, Monthly Weather Review 78(1), equation 2.
    """
    table, truth = _checked(probs, labels)
    gap = table.copy()
    gap[np.arange(len(truth)), truth] -= 1
    return float((gap**2).sum(axis=1).mean())


def brier_binary(probs: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
    """Binary Brier score, ``mean_i (p_i - y_i)^2``, in [0, 1].

    Args:
        probs: probability of outcome 1, (N,).
        outcomes: 0 or 1, (N,).
    """
    p = np.asarray(probs, dtype=np.float64)
    y = as_labels(outcomes, num_classes=2)
    not_empty(len(y))
    if p.shape != y.shape:
        raise ValueError(f"probabilities have shape {p.shape}, expected {y.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"probabilities span {p.min():.6g} to {p.max():.6g}, expected [0, 1]")
    return float(((p - y) ** 2).mean())


def reliability_curve(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bins: int = 15,
    scheme: Scheme = "width",
) -> Reliability:
    """Mean confidence and accuracy of the samples of each bin of confidence.

    Args:
        probs: class probabilities (N, C), or confidences (N,).
        labels: class numbers (N,); with confidences: correct or not (N,), bool or 0/1.
        bins: number of bins B.
        scheme: ``width``: bin b holds ``(b / B, (b + 1) / B]``, and 0 belongs to the first.
            ``mass``: samples sorted by confidence, rank r goes to bin ``r * B // N``; equal
            confidences go together to the bin of the lowest of them, so the order of the
            samples never matters, and bins may stay empty.
    """
    confidence, correct = _confidence(probs, labels)
    where = _bin_of(confidence, bins, scheme)
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            confidence=np.bincount(where, weights=confidence, minlength=bins) / count,
            accuracy=np.bincount(where, weights=correct, minlength=bins) / count,
            count=count.astype(np.int64),
        )


def ece(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bins: int = 15,
    scheme: Scheme = "width",
) -> float:
    """Expected calibration error, ``sum_b (n_b / N) |accuracy_b - confidence_b|``, in [0, 1].

    Arguments as ``reliability_curve``. Of the whole set: a mean of per-batch values is
    biased upwards.

    Source: Guo et al. 2017, arXiv:1706.04599, section 2 (``width``); Nguyen and O'Connor
    2015, arXiv:1508.05154, section 3 (``mass``).
    """
    curve = reliability_curve(probs, labels, bins=bins, scheme=scheme)
    full = curve.count > 0
    gaps = np.abs(curve.accuracy[full] - curve.confidence[full])
    return float((curve.count[full] * gaps).sum() / curve.count.sum())


class Calibration:
    """Streaming equal-width ECE, NLL and Brier score; O(bins) memory."""

    def __init__(self, *, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins is {bins}, expected at least 1")
        self.bins = bins
        self._count = np.zeros(bins, np.int64)
        self._correct = np.zeros(bins, np.float64)
        self._confidence = np.zeros(bins, np.float64)
        self._nll = 0.0
        self._brier = 0.0

    def update(self, probs: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Add a batch: ``probs`` (N, C) with rows that sum to 1, ``labels`` (N,)."""
        truth = as_labels(labels)
        if not len(truth):
            return
        table, truth = _checked(probs, truth)
        confidence, correct = _confidence(table, truth)
        where = _bin_of(confidence, self.bins, "width")
        self._count += np.bincount(where, minlength=self.bins)
        self._correct += np.bincount(where, weights=correct, minlength=self.bins)
        self._confidence += np.bincount(where, weights=confidence, minlength=self.bins)
        self._nll += nll(table, truth) * len(truth)
        self._brier += brier(table, truth) * len(truth)

    def merge(self, other: Calibration) -> None:
        """Add the sums of another process or part of the data."""
        if self.bins != other.bins:
            raise ValueError(f"cannot merge {other.bins} bins, expected {self.bins}")
        self._count += other._count
        self._correct += other._correct
        self._confidence += other._confidence
        self._nll += other._nll
        self._brier += other._brier

    def result(self) -> dict[str, float]:
        """``accuracy``, ``confidence``, ``ece``, ``nll`` (nats), ``brier`` (in [0, 2])."""
        total = int(self._count.sum())
        not_empty(total)
        return {
            "accuracy": float(self._correct.sum() / total),
            "confidence": float(self._confidence.sum() / total),
            "ece": float(np.abs(self._correct - self._confidence).sum() / total),
            "nll": self._nll / total,
            "brier": self._brier / total,
        }


def fit_temperature(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bounds: tuple[float, float] = (0.01, 100.0),
) -> float:
    """The temperature T > 0 that minimises ``nll_from_logits(logits, labels, temperature=T)``.

    The NLL is convex in 1/T, and its slope there, ``mean(E_p[z] - z_label)``, never falls;
    its root is found to the last digits. Without a root within ``bounds`` (all samples
    right: T wants to be 0; worse than chance: infinity) the nearer bound is returned.

    Args:
        logits: (N, C), finite.
        labels: (N,).
        bounds: smallest and largest temperature.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import brentq

    low, high = bounds
    if not 0 < low < high:
        raise ValueError(f"bounds are {bounds}, expected 0 < low < high")
    table = as_scores(logits)
    truth = as_labels(labels, num_classes=table.shape[1])
    not_empty(len(truth))
    if len(table) != len(truth):
        raise ValueError(f"got {len(table)} rows of logits for {len(truth)} labels")
    shifted = table - table.max(axis=1, keepdims=True)
    own = shifted[np.arange(len(truth)), truth]

    def slope(inverse: float) -> float:
        probs = np.exp(log_softmax(shifted, temperature=1 / inverse))
        return float(((probs * shifted).sum(axis=1) - own).mean())

    if slope(1 / low) <= 0:
        return float(low)
    if slope(1 / high) >= 0:
        return float(high)
    return float(1 / brentq(slope, 1 / high, 1 / low, xtol=1e-14, rtol=1e-14))


def _checked(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Integers]:
    truth = as_labels(labels)
    not_empty(len(truth))
    table = as_probabilities(probs, rows=len(truth))
    return table, as_labels(truth, num_classes=table.shape[1])


def _confidence(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Confidence (N,) and correctness (N,) as 0.0 / 1.0."""
    array = np.asarray(probs, dtype=np.float64)
    if array.ndim != 1:
        table, truth = _checked(array, labels)
        correct = (table.argmax(axis=1) == truth).astype(np.float64)
        return np.minimum(table.max(axis=1), 1.0), correct
    right = as_labels(labels, num_classes=2)
    not_empty(len(right))
    if array.shape != right.shape:
        raise ValueError(f"confidences have shape {array.shape}, expected {right.shape}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"confidences span {array.min():.6g} to {array.max():.6g}, not in [0, 1]")
    return array, right.astype(np.float64)


def _bin_of(confidence: Floats, bins: int, scheme: str) -> Integers:
    """The bin of each confidence, int64 (N,)."""
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    if scheme == "width":
        inner = np.arange(1, bins) / bins
        return np.searchsorted(inner, confidence, side="left").astype(np.int64)
    if scheme == "mass":
        ordered = np.sort(confidence)
        lowest_rank = np.searchsorted(ordered, confidence, side="left").astype(np.int64)
        return lowest_rank * bins // len(confidence)
    raise ValueError(f"scheme is {scheme!r}, expected 'width' or 'mass'")
