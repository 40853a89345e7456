"""Risk-controlled thresholds: the user names the accuracy that may be lost and how sure to be.

Learn then Test with fixed-sequence testing: candidate thresholds are tested from the safest (no
early exit) downwards, each null hypothesis being "the risk at this threshold exceeds the level";
the walk stops at the first that cannot be rejected. With probability at least
``confidence_level`` over the draw of the calibration set, the true risk at the returned threshold
is at most the level.

Source: Angelopoulos et al. 2021, Learn then Test, arXiv 2110.01052 (fixed-sequence testing,
Hoeffding-Bentkus p-value); risk control for early exits: Jazbec et al. 2024, arXiv 2405.20915.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from gfnet_dynn.exit_evaluation import ExitLogits, first_exit_at, never_leaves, take_exit
from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy

RISKS = ("regret", "consistency", "error")


def hoeffding_bentkus_p_value(risk: ArrayLike, num_samples: int, level: float) -> NDArray:
    """p-value of "the expected loss exceeds ``level``" for losses in [0, 1].

    ``min(exp(-n h(min(r, a), a)), e P(Bin(n, a) <= ceil(n r)))`` with ``h`` the binary
    relative entropy in nats.

    Args:
        risk: mean loss on n samples, in [0, 1]; any shape.
        num_samples: n.
        level: a, in (0, 1).

    Source: arXiv 2110.01052, section 3.1 (Hoeffding-Bentkus inequality).
    """
    _check(num_samples, level)
    r = np.asarray(risk, dtype=np.float64)
    low = np.minimum(r, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.where(low > 0, low * np.log(low / level), 0.0)
        h += np.where(low < 1, (1 - low) * np.log((1 - low) / (1 - level)), 0.0)
    hoeffding = np.exp(-num_samples * h)
    # Rounding must not turn an exact count up by one; a larger count would only be safer.
    bentkus = np.e * binom.cdf(np.ceil(num_samples * r - 1e-9), num_samples, level)
    return np.minimum(np.minimum(hoeffding, bentkus), 1.0)


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


def exit_risk_losses(predictions: NDArray, labels: NDArray, exit_index: NDArray, kind: str):
    """Loss 0 or 1 of each sample for leaving where it does, ``(N,)`` bool.

    - ``regret``: the full network is right and the exit is wrong. Its mean is at least the
      accuracy that early exit loses (it does not count what early exit happens to repair).
    - ``consistency``: the exit predicts another class than the full network; needs no labels.
    - ``error``: the exit is wrong, whatever the full network says.

    Args:
        predictions: int ``(G+1, N)``, final head last.
        exit_index: int ``(N,)`` in ``0..G``.
    """
    if kind not in RISKS:
        raise ValueError(f"unknown risk {kind!r}; expected one of {', '.join(RISKS)}")
    left, full = take_exit(predictions, exit_index), predictions[-1]
    if kind == "consistency":
        return left != full
    wrong = left != labels
    return wrong & (full == labels) if kind == "regret" else wrong


@dataclass(frozen=True)
class RiskControl:
    """A threshold and what is promised of it."""

    threshold: float  # leave where the score reaches it
    kind: str
    level: float  # the risk that is promised not to be exceeded, fraction
    confidence: float  # probability over calibration sets that the promise holds
    calibration_risk: float  # mean loss on the calibration set at the threshold
    num_samples: int
    num_tested: int  # hypotheses tested until the walk stopped
    num_accepted: int  # thresholds that hold the risk; 0: not even the full network does

    def as_dict(self) -> dict:
        """Plain JSON."""
        return asdict(self)


def control_risk(
    scores: NDArray,
    predictions: NDArray,
    labels: NDArray,
    *,
    level: float,
    confidence_level: float = 0.9,
    kind: str = "regret",
    candidates: Sequence[float] | NDArray | None = None,
    p_value: str = "binomial",
) -> RiskControl:
    """The lowest shared threshold whose risk is controlled: the earliest exits that are safe.

    Args:
        scores: float ``(N, G)``, each exit's score on the calibration set.
        predictions: int ``(G+1, N)``, final head last.
        labels: int ``(N,)``.
        level: the risk that may be taken, fraction in (0, 1): 0.01 for one point of accuracy.
        confidence_level: how sure to be, fraction in (0, 1).
        kind: see :func:`exit_risk_losses`.
        candidates: thresholds, tested from the largest down. They must not be chosen by looking
            at the calibration set; 0, 0.005 ... 1 if None.
        p_value: ``binomial`` (exact, losses are 0 or 1) or ``hoeffding-bentkus``.

    Returns:
        The threshold; one that no score reaches when no other can be accepted, and then
        ``num_accepted`` says whether the full network itself holds the risk.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(
            f"the confidence is {confidence_level}; expected a fraction between 0 and 1"
        )
    if p_value not in ("binomial", "hoeffding-bentkus"):
        raise ValueError(
            f"unknown p-value {p_value!r}; expected one of binomial, hoeffding-bentkus"
        )
    n = len(labels)
    _check(n, level)
    if candidates is None:
        candidates = np.linspace(0, 1, 201)
    never = never_leaves(scores.shape[1])
    walk = np.concatenate([[never], np.unique(np.asarray(candidates, dtype=np.float64))[::-1]])
    threshold, accepted, tested, risk = never, 0, 0, 0.0
    for candidate in walk:
        exit_index = first_exit_at(scores, candidate)
        losses = exit_risk_losses(predictions, labels, exit_index, kind)
        count = int(losses.sum())
        if p_value == "binomial":
            p = float(binomial_p_value(count, n, level))
        else:
            p = float(hoeffding_bentkus_p_value(count / n, n, level))
        tested += 1
        if tested == 1:
            risk = count / n  # reported when nothing is accepted
        if p > 1 - confidence_level:
            break
        threshold, accepted, risk = float(candidate), accepted + 1, count / n
    return RiskControl(
        threshold, kind, float(level), float(confidence_level), risk, n, tested, accepted
    )


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
