"""A linear classifier on features: the probe from which a head starts, and the floor of a report.

The classifier is scikit-learn's multinomial logistic regression on standardised features. The
standardisation is folded into its weights, so that they can be put into a linear layer as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

STRENGTHS = (0.003, 0.03, 0.3)  # inverse weights of the penalty, on standardised features
# A feature that is nearly always the same would get a huge weight, and the answers would jump with
# the least change of what is below the classifier: below this share of the median spread it has 0.
HARDLY = 0.1


@dataclass(frozen=True)
class LinearProbe:
    """``features @ weight.T + bias`` are logits.

    Attributes:
        weight: float32 ``(K, D)``.
        bias: float32 ``(K,)``.
        strength: the inverse weight of the penalty that was taken.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    strength: float

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """``(N, K)`` of features ``(N, D)``."""
        return np.asarray(features @ self.weight.T + self.bias, np.float32)

    def accuracy(self, features: NDArray[np.floating], labels: ArrayLike) -> float:
        """Fraction of right answers."""
        return float((self.logits(features).argmax(axis=1) == np.asarray(labels)).mean())


def fit_probe(
    features: NDArray[np.floating],
    labels: ArrayLike,
    *,
    num_classes: int,
    validation: tuple[NDArray[np.floating], ArrayLike] | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe:
    """Fit a classifier; of several strengths the one with the lowest loss on ``validation``.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)`` in ``0 .. num_classes - 1``; a class without a sample gets the bias -1e4.
        num_classes: K.
        validation: features and labels that decide the strength; without them it is the middle one.
        strengths: of scikit-learn's ``C``.

    Raises:
        ValueError: labels of fewer than two classes, or out of range.
    """
    from sklearn.linear_model import LogisticRegression

    truth = np.asarray(labels)
    present = np.unique(truth)
    if len(present) < 2 or present[0] < 0 or present[-1] >= num_classes:
        raise ValueError(
            f"labels of {len(present)} classes up to {present.max(initial=-1)}, expected two or "
            f"more classes below {num_classes}"
        )
    values = np.asarray(features, np.float64)
    mean, scale = values.mean(axis=0), values.std(axis=0)
    scale[scale <= max(HARDLY * float(np.median(scale)), 1e-8)] = np.inf  # weight 0
    standard = ((values - mean) / scale).astype(np.float32)
    tried = strengths if validation is not None else (sorted(strengths)[len(strengths) // 2],)
    found: list[tuple[float, LinearProbe]] = []
    for strength in tried:
        model = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(standard, truth)
        coef, intercept = model.coef_, model.intercept_
        if len(present) == 2:  # scikit-learn keeps one row: the second class against the first
            coef, intercept = np.vstack([0 * coef, coef]), np.array([0.0, intercept[0]])
        weight = np.zeros((num_classes, values.shape[1]))
        bias = np.full(num_classes, -1e4)
        weight[present] = coef / scale
        bias[present] = intercept - weight[present] @ mean
        probe = LinearProbe(weight.astype(np.float32), bias.astype(np.float32), float(strength))
        found.append((0.0 if validation is None else _loss(probe, *validation), probe))
    return min(found, key=lambda one: one[0])[1]


def _loss(probe: LinearProbe, features: NDArray[np.floating], labels: ArrayLike) -> float:
    """Mean cross-entropy, nats."""
    logits = probe.logits(features).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    rows = np.arange(len(logits))
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[rows, np.asarray(labels)]).mean())
