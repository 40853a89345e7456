"""Thresholds from calibration data: sweeps, budgets, temperatures. Test data only ever reports.

All sweeps are exact and without loops over samples: with one threshold for all exits, a sample is
past exit l when its running maximum of scores up to l lies below the threshold. Each (sample,
exit) pair is thus one event at one score, and a sweep needs only sums over the events below a
threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gfnet_dynn.choices import POINTS
from gfnet_dynn.decide.exit_outputs import ExitLogits, exit_rates, summarise, take_exit
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy, first_reached
from shared_core import metrics

SWEEP = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the thresholds of the original's --eval
HALF_COST = 0.5  # mean cost of the "fast" point, share of a run to the final head


@dataclass(frozen=True)
class Sweep:
    """Accuracy and cost of shared thresholds; cost never falls from one to the next."""

    thresholds: NDArray  # (T,), rising
    accuracy: NDArray  # (T,), fractions
    cost: NDArray  # (T,), mean MACs an image
    rates: NDArray  # (T, G+1), fractions
    exit_accuracy: NDArray  # (T, G+1), of those who leave there; NaN where nobody does

    def rows(self) -> list[dict]:
        """Plain JSON, one row a threshold; None for an accuracy of nobody."""
        return [
            {
                "threshold": float(self.thresholds[i]),
                "accuracy": float(self.accuracy[i]),
                "cost": float(self.cost[i]),
                "rates": self.rates[i].tolist(),
                "exit_accuracy": [
                    None if np.isnan(value) else float(value) for value in self.exit_accuracy[i]
                ],
            }
            for i in range(len(self.thresholds))
        ]


def between(below: NDArray | float, above: NDArray | float) -> NDArray:
    """A threshold in the middle of two neighbouring scores, ``below < threshold <= above``.

    Another runtime rounds scores a little differently. A threshold that is itself the score of a
    calibration sample lets that sample, and those that tie with it, in or out by that rounding;
    one in the middle of the gap does not. It is a float32 number, so that comparisons in float32
    and float64 agree.
    """
    below, above = np.asarray(below, dtype=np.float64), np.asarray(above, dtype=np.float64)
    middle = ((below + above) / 2).astype(np.float32).astype(np.float64)
    return np.where((below < middle) & (middle <= above), middle, above)


def breakpoints(scores: NDArray) -> NDArray:
    """One threshold for every routing there is, rising; nobody reaches the last one.

    Routings change at scores; the thresholds stand in the middle of the gaps between them. The
    first one, half the least score, lets all leave at the first exit.
    """
    running = np.maximum.accumulate(np.asarray(scores, dtype=np.float64), axis=1)
    values = np.unique(running)
    below = np.append(np.minimum(0.0, values[:1]), values[:-1])
    return np.append(between(below, values), NEVER)


def sweep(
    scores: NDArray,
    correct: NDArray,
    costs: NDArray,
    *,
    thresholds: Sequence[float] | NDArray | None = None,
) -> Sweep:
    """What each shared threshold does: a sample leaves at the first score that reaches it.

    Args:
        scores: ``(N, G)``.
        correct: bool ``(G+1, N)``.
        costs: cumulative MACs ``(G+1,)``.
        thresholds: every one that matters (:func:`breakpoints`) if None.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n, num_gates = scores.shape
    if correct.shape != (num_gates + 1, n) or len(costs) != num_gates + 1 or n < 1:
        raise ValueError(
            f"scores have shape {scores.shape}, correct {correct.shape}, costs ({len(costs)},); "
            f"expected (N, G), (G+1, N), (G+1,)"
        )
    if thresholds is None:
        thresholds = breakpoints(scores)
    thresholds = np.unique(np.asarray(thresholds, dtype=np.float64))
    limits = thresholds.astype(np.float32)  # as the policy compares
    running = np.maximum.accumulate(scores, axis=1)  # (N, G)
    # past[t, l]: samples that go past exit l; good[t, l]: those of them that exit l has right,
    # good_next[t, l]: those of them that exit l+1 has right.
    past = np.zeros((len(thresholds), num_gates))
    good, good_next = past.copy(), past.copy()
    for exit_number in range(num_gates):
        order = np.argsort(running[:, exit_number], kind="stable")
        below = np.searchsorted(running[order, exit_number], limits, side="left")
        past[:, exit_number] = below
        for column, source in ((good, exit_number), (good_next, exit_number + 1)):
            total = np.concatenate([[0], np.cumsum(correct[source][order])])
            column[:, exit_number] = total[below]
    nobody = np.zeros((len(thresholds), 1))
    leave = np.hstack([nobody + n, past]) - np.hstack([past, nobody])
    leave_good = np.hstack([nobody + correct[0].sum(), good_next]) - np.hstack([good, nobody])
    with np.errstate(invalid="ignore"):
        exit_accuracy = leave_good / leave
    # From the first exit's cost upwards: adding steps that are never negative cannot fall.
    cost = costs[0] + past @ np.diff(costs) / n
    return Sweep(thresholds, leave_good.sum(axis=1) / n, cost, leave / n, exit_accuracy)


def sweep_policy(
    outputs: ExitLogits, policy: ExitPolicy, *, thresholds: Sequence[float] | None = SWEEP
) -> Sweep:
    """:func:`sweep` of a policy's scores on a split."""
    return sweep(outputs.scores(policy), outputs.correct, outputs.costs, thresholds=thresholds)


def fit_temperatures(calibration: ExitLogits) -> tuple[float, ...]:
    """One temperature an exit, final head last, that minimises its NLL on calibration data.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    return tuple(
        metrics.fit_temperature(exit_logits, calibration.labels)
        for exit_logits in calibration.logits
    )


def calibrated_policy(policy: ExitPolicy, calibration: ExitLogits) -> ExitPolicy:
    """The same policy with the temperatures of :func:`fit_temperatures`."""
    return ExitPolicy(policy.kind, policy.thresholds, fit_temperatures(calibration))


def _different_splits(calibration: ExitLogits, test: ExitLogits) -> None:
    if calibration.fingerprint == test.fingerprint:
        raise ValueError(
            f"thresholds of split {calibration.split!r} are reported on the same samples; "
            "expected a calibration split and a test split"
        )


@dataclass(frozen=True)
class Solution:
    """A policy found on calibration data and what it does on both splits."""

    policy: ExitPolicy
    calibration: dict  # of summarise()
    test: dict | None


def _solution(policy: ExitPolicy, calibration: ExitLogits, test: ExitLogits | None) -> Solution:
    if test is not None:
        _different_splits(calibration, test)
    return Solution(
        policy,
        summarise(calibration, policy),
        None if test is None else summarise(test, policy),
    )


def solve_for_cost(
    policy: ExitPolicy,
    calibration: ExitLogits,
    *,
    mean_cost: float,
    test: ExitLogits | None = None,
) -> Solution:
    """The shared threshold that spends as much as it may: mean cost at most ``mean_cost``.

    Args:
        policy: its kind and temperatures are kept.
        mean_cost: MACs an image, on calibration data.
        test: another split to report on.

    Raises:
        ValueError: not even leaving at the first exit is that cheap.
    """
    if mean_cost < calibration.costs[0]:
        raise ValueError(
            f"the cost budget is {mean_cost:.6g} MACs; expected {calibration.costs[0]:.6g} (all "
            "leave at the first exit) or more"
        )
    curve = sweep_policy(calibration, policy, thresholds=None)
    # The budget itself may be reached by a sum that rounds up in its last digit.
    allowed = np.flatnonzero(curve.cost <= mean_cost * (1 + 1e-12))
    # At the lowest breakpoint all leave at the first exit, so one is always allowed.
    threshold = float(curve.thresholds[allowed[-1]])
    return _solution(policy.with_thresholds(threshold), calibration, test)


def solve_for_accuracy(
    policy: ExitPolicy,
    calibration: ExitLogits,
    *,
    accuracy: float,
    test: ExitLogits | None = None,
) -> Solution:
    """The cheapest shared threshold that reaches ``accuracy`` on calibration data.

    Raises:
        ValueError: no threshold reaches it; the message names the best there is.
    """
    curve = sweep_policy(calibration, policy, thresholds=None)
    enough = np.flatnonzero(curve.accuracy >= accuracy - 1e-12)
    if not len(enough):
        raise ValueError(
            f"the accuracy asked for is {accuracy:.6g}; expected at most "
            f"{curve.accuracy.max():.6g}, the best of any threshold on calibration data"
        )
    threshold = float(curve.thresholds[enough[0]])  # cost never falls with the threshold
    return _solution(policy.with_thresholds(threshold), calibration, test)


def three_policies(
    policy: ExitPolicy, calibration: ExitLogits, *, max_loss: float
) -> dict[str, ExitPolicy]:
    """Thresholds for three wishes, all fitted on the calibration split.

    ``careful``: the cheapest that loses nothing against the final head; ``balanced``: the cheapest
    that loses at most ``max_loss``; ``fast``: the most accurate use of half the MACs.
    """
    final = float(calibration.correct[-1].mean())
    budget = max(HALF_COST * float(calibration.costs[-1]), float(calibration.costs[0]))
    found = (
        # Never leaving is always among the candidates, so both accuracies can be met.
        solve_for_accuracy(policy, calibration, accuracy=final),
        solve_for_accuracy(policy, calibration, accuracy=max(0.0, final - max_loss)),
        solve_for_cost(policy, calibration, mean_cost=budget),
    )
    return {name: one.policy for name, one in zip(POINTS, found, strict=True)}


def budget_fractions(q: float, num_exits: int) -> NDArray:
    """Share of the samples that should leave at each exit, ``~ q^k``, k = 1..num_exits.

    Source: MSDNet, Huang et al. 2018, arXiv 1703.09844, section 5 (budgeted batch).
    """
    if not q > 0:
        raise ValueError(f"the exit ratio is {q}; expected more than 0")
    shares = np.exp(np.log(q) * np.arange(1, num_exits + 1))
    return shares / shares.sum()


def budget_thresholds(scores: NDArray, fractions: NDArray) -> NDArray:
    """Per-exit thresholds that let about the given share of all samples leave at each exit.

    Exit by exit, the ``floor(share * N)`` samples of highest score among those still in leave, and
    those that tie with the last of them; the threshold stands in the gap below.

    Args:
        scores: ``(N, G)`` on calibration data.
        fractions: ``(G+1,)``, sums to 1.

    Returns:
        ``(G,)``; a threshold that no score reaches where nobody should leave.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n, num_gates = scores.shape
    if len(fractions) != num_gates + 1:
        raise ValueError(f"{len(fractions)} exit fractions; expected {num_gates + 1}")
    thresholds = np.full(num_gates, NEVER)
    inside = np.ones(n, dtype=bool)
    for index in range(num_gates):
        here = scores[inside, index]
        wanted = min(int(np.floor(fractions[index] * n + 1e-9)), len(here))
        if wanted < 1:
            continue
        least = np.partition(here, len(here) - wanted)[len(here) - wanted]
        thresholds[index] = _gap_below(least, here)
        inside &= scores[:, index] < thresholds[index]
    return thresholds


def budgeted_batch(
    policy: ExitPolicy, calibration: ExitLogits, test: ExitLogits, *, points: int = 39
) -> list[dict]:
    """The budgeted-batch curve: thresholds on calibration data, accuracy and cost on test data.

    Point p of 1..``points`` has the exit ratio ``q = 2 p / (points + 1)``: 0.05 ... 1.95 for 39.

    Returns:
        A row a point, plain JSON: ``q``, ``thresholds``, ``accuracy``, ``cost`` (mean MACs an
        image), ``rates``.

    Source: MSDNet, Huang et al. 2018, arXiv 1703.09844, section 5.
    """
    _different_splits(calibration, test)
    calibration_scores, test_scores = calibration.scores(policy), test.scores(policy)
    rows = []
    for point in range(1, points + 1):
        q = 2 * point / (points + 1)
        fractions = budget_fractions(q, calibration.num_gates + 1)
        thresholds = budget_thresholds(calibration_scores, fractions)
        exit_index = first_reached(test_scores, thresholds)
        rates = exit_rates(exit_index, test.num_gates)
        rows.append(
            {
                "q": q,
                "thresholds": thresholds.tolist(),
                "accuracy": float(take_exit(test.correct, exit_index).mean()),
                "cost": float(rates @ test.costs),
                "rates": rates.tolist(),
            }
        )
    return rows


def _gap_below(score: float, scores: NDArray) -> float:
    """The threshold between a score and the next lower one of ``scores``."""
    lower = scores[scores < score]
    return float(between(lower.max() if len(lower) else min(0.0, score), score))
