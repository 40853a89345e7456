"""What is promised of early exits: a bound on the risk, and sets that hold the true class.

**Risk control.** The user names the accuracy that may be lost and how sure to be. Learn then Test
with fixed-sequence testing: candidate thresholds are tested from the safest (no early exit)
downwards, each null hypothesis being "the risk at this threshold exceeds the level"; the walk stops
at the first that cannot be rejected. With probability at least ``confidence_level`` over the draw
of the calibration set, the true risk at the returned threshold is at most the level.

Source: Angelopoulos et al. 2021, Learn then Test, arXiv 2110.01052 (fixed-sequence testing); risk
control for early exits: Jazbec et al. 2024, arXiv 2405.20915.

**Conformal sets** hold the true class 1 - alpha of the time. The score is LAC's, ``1 - p_true``:
Sadinle et al. 2019, arXiv 1609.00451. Families, by the name of the original (Regol et al. 2023,
arXiv 2310.09163): ``general`` has one quantile from the scores of all samples, each at the exit it
leaves at, and covers over all samples; ``gated_strict`` has one for each exit from the samples that
leave there, and covers at every single exit. (The original's other two take samples into an exit's
quantile that do not leave there, and promise too much where hard samples run to the end.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from gfnet_dynn.decide.exit_outputs import ExitLogits, take_exit
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy, first_reached

FAMILIES = ("general", "gated_strict")


def binomial_p_value(count: ArrayLike, num_samples: int, level: float) -> NDArray:
    """Exact p-value of "the error probability exceeds ``level``": ``P(Bin(n, level) <= count)``.

    Args:
        count: samples with loss 1, of ``num_samples``; losses are 0 or 1.
    """
    _check(num_samples, level)
    return np.asarray(binom.cdf(np.asarray(count), num_samples, level), dtype=np.float64)


def _check(num_samples: int, level: float) -> None:
    if num_samples < 1:
        raise ValueError(f"{num_samples} calibration samples; expected 1 or more")
    if not 0 < level < 1:
        raise ValueError(f"the risk level is {level}; expected a fraction between 0 and 1")


def regret(predictions: NDArray, labels: NDArray, exit_index: NDArray) -> NDArray:
    """Samples that the full network has right and the exit they leave at wrong, bool ``(N,)``.

    The mean is at least the accuracy that early exit loses: it does not count what early exit
    happens to repair.

    Args:
        predictions: int ``(G+1, N)``, final head last.
        exit_index: int ``(N,)`` in ``0..G``.
    """
    return (take_exit(predictions, exit_index) != labels) & (predictions[-1] == labels)


@dataclass(frozen=True)
class RiskControl:
    """A threshold and what is promised of it."""

    threshold: float  # leave where the score reaches it
    level: float  # the risk that is promised not to be exceeded, fraction
    confidence: float  # probability over calibration sets that the promise holds
    calibration_risk: float  # mean loss on the calibration set at the threshold
    num_samples: int
    num_tested: int  # hypotheses tested until the walk stopped
    num_accepted: int  # thresholds that hold the risk; 0: not even the full network does


def control_risk(
    scores: NDArray,
    predictions: NDArray,
    labels: NDArray,
    *,
    level: float,
    confidence_level: float = 0.9,
    candidates: Sequence[float] | NDArray | None = None,
) -> RiskControl:
    """The lowest shared threshold whose risk is controlled: the earliest exits that are safe.

    Args:
        scores: float ``(N, G)``, each exit's score on the calibration set.
        predictions: int ``(G+1, N)``, final head last.
        labels: int ``(N,)``.
        level: the risk that may be taken, fraction in (0, 1): 0.01 for one point of accuracy.
        confidence_level: how sure to be, fraction in (0, 1).
        candidates: thresholds, tested from the largest down. They must not be chosen by looking
            at the calibration set; 0, 0.005 ... 1 if None.

    Returns:
        The threshold; one that no score reaches when no other can be accepted, and then
        ``num_accepted`` says whether the full network itself holds the risk.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(
            f"the confidence is {confidence_level}; expected a fraction between 0 and 1"
        )
    n = len(labels)
    _check(n, level)
    if candidates is None:
        candidates = np.linspace(0, 1, 201)
    walk = np.concatenate([[NEVER], np.unique(np.asarray(candidates, dtype=np.float64))[::-1]])
    threshold, accepted, tested, risk = NEVER, 0, 0, 0.0
    for candidate in walk:
        exit_index = first_reached(scores, float(candidate))
        count = int(regret(predictions, labels, exit_index).sum())
        p = float(binomial_p_value(count, n, level))
        tested += 1
        if tested == 1:
            risk = count / n  # reported when nothing is accepted
        if p > 1 - confidence_level:
            break
        threshold, accepted, risk = float(candidate), accepted + 1, count / n
    return RiskControl(threshold, float(level), float(confidence_level), risk, n, tested, accepted)


def risk_controlled_policy(
    policy: ExitPolicy, calibration: ExitLogits, **options
) -> tuple[ExitPolicy, RiskControl]:
    """The policy with a risk-controlled shared threshold; options as for :func:`control_risk`.

    Its temperatures must come from other samples than ``calibration``, or the promise is void.
    """
    found = control_risk(
        calibration.scores(policy), calibration.predictions, calibration.labels, **options
    )
    return policy.with_thresholds(found.threshold), found


def lac_scores(probabilities: NDArray, labels: NDArray) -> NDArray:
    """``1 - p_true``, float64 ``(N,)`` in [0, 1], of probabilities ``(N, K)``."""
    p = np.asarray(probabilities, dtype=np.float64)
    return 1 - p[np.arange(len(p)), labels]


def conformal_quantile(scores: NDArray, alpha: float) -> float:
    """The ``ceil((n+1)(1-alpha))``-th smallest of n scores; infinite when n is too small.

    The original capped the rank at n, which breaks the promise for small n, and took
    ``1 - alpha`` for n = 0. An infinite quantile gives the set of all classes.

    Source: split conformal prediction, e.g. Lei et al. 2018, arXiv 1604.04173.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; expected a fraction between 0 and 1")
    n = len(scores)
    # 1e-9: (n+1)(1-alpha) that is a whole number on paper must not be rounded up to the next.
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        return math.inf
    return float(np.partition(np.asarray(scores, dtype=np.float64), rank - 1)[rank - 1])


@dataclass(frozen=True)
class ConformalSets:
    """Quantiles of one family at one alpha."""

    family: str
    alpha: float
    quantiles: tuple[float, ...]  # one an exit, final head last; inf: every class is in the set

    def sets(self, probabilities: NDArray, exit_index: NDArray) -> NDArray:
        """Which classes are in each sample's set, bool ``(N, K)``.

        Args:
            probabilities: ``(G+1, N, K)``, final head last.
            exit_index: int ``(N,)`` in ``0..G``.
        """
        p = np.asarray(probabilities, dtype=np.float64)
        chosen = p[exit_index, np.arange(p.shape[1])]  # (N, K)
        return 1 - chosen <= np.asarray(self.quantiles)[exit_index][:, None]

    def evaluate(self, probabilities: NDArray, labels: NDArray, exit_index: NDArray) -> dict:
        """``C`` (mean set size in classes), ``emp_alpha`` (1 - coverage), and coverage per exit.

        ``coverage_per_exit`` holds None for an exit that nobody left at. The samples must be others
        than those of the calibration.
        """
        members = self.sets(probabilities, exit_index)
        covered = members[np.arange(len(labels)), labels]
        exits = range(len(self.quantiles))
        return {
            "C": float(members.sum(axis=1).mean()),
            "emp_alpha": float(1 - covered.mean()),
            "coverage_per_exit": [
                float(covered[exit_index == e].mean()) if (exit_index == e).any() else None
                for e in exits
            ],
        }


def calibrate(
    probabilities: NDArray, labels: NDArray, exit_index: NDArray, *, alpha: float, family: str
) -> ConformalSets:
    """Quantiles from a calibration split.

    Args:
        probabilities: ``(G+1, N, K)``, final head last; temperature-scaled or not, as in use.
        labels: int ``(N,)``.
        exit_index: int ``(N,)`` in ``0..G``, where each sample leaves.
        alpha: share of samples whose set may miss the true class, fraction in (0, 1).
        family: one of ``FAMILIES``.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    num_exits, n = probabilities.shape[:2]
    if len(labels) != n or len(exit_index) != n:
        raise ValueError(
            f"{len(labels)} labels and {len(exit_index)} exits of {n} samples; expected {n} each"
        )
    scores = np.stack([lac_scores(p, labels) for p in probabilities])  # (G+1, N)
    if family == "general":
        gated = scores[exit_index, np.arange(n)]
        quantiles = [conformal_quantile(gated, alpha)] * num_exits
    else:
        quantiles = []
        for index in range(num_exits):
            quantiles.append(conformal_quantile(scores[index, exit_index == index], alpha))
    return ConformalSets(family, float(alpha), tuple(quantiles))
