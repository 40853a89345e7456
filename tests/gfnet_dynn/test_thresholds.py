"""Sweeps, budgets and solvers against loops over samples and over all thresholds."""

import time

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.decide.thresholds import (
    SWEEP,
    between,
    breakpoints,
    budget_fractions,
    budget_thresholds,
    budgeted_batch,
    calibrated_policy,
    fit_temperatures,
    solve_for_accuracy,
    solve_for_cost,
    sweep,
    sweep_policy,
)
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy

COSTS = np.array([100.0, 180.0, 250.0, 400.0])


def outputs_of(seed=0, n=80, k=4, gates=3, scale=1.0):
    """Later exits are better; gate scores follow how sure an exit is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(gates + 1, n, k))
    logits[:, np.arange(n), labels] += np.arange(1, gates + 2)[:, None] * 0.6
    logits *= scale
    p_max = np.sort(logits, axis=2)[:, :, -1] - np.sort(logits, axis=2)[:, :, -2]
    gate_logits = (p_max[:-1].T - 1 + rng.normal(size=(n, gates)) * 0.3).astype(np.float32)
    costs = COSTS[: gates + 1]
    return ExitLogits(logits.astype(np.float32), gate_logits, labels, costs, tuple(range(gates)))


def route(scores, threshold):
    """Per-sample loop: where each sample leaves."""
    thresholds = np.broadcast_to(threshold, scores.shape[1])
    result = []
    for row in scores.tolist():
        result.append(next((i for i, s in enumerate(row) if s >= thresholds[i]), scores.shape[1]))
    return result


def account(outputs, exits):
    right = [bool(outputs.correct[e, i]) for i, e in enumerate(exits)]
    return float(np.mean(right)), float(np.mean([outputs.costs[e] for e in exits])), right


@pytest.mark.parametrize("kind", ["gate", "max_prob", "entropy", "margin", "patience", "jei"])
def test_sweep_equals_the_loop(kind):
    outputs = outputs_of()
    policy = ExitPolicy(kind)
    scores = outputs.scores(policy)
    got = sweep_policy(outputs, policy, thresholds=[0.0, *SWEEP, 1.0, 2.0, NEVER])
    for i, threshold in enumerate(got.thresholds):
        exits = route(scores, threshold)
        assert exits == outputs.select(policy.with_thresholds(threshold)).tolist()
        accuracy, cost, right = account(outputs, exits)
        assert got.accuracy[i] == pytest.approx(accuracy)
        assert got.cost[i] == pytest.approx(cost)
        for e in range(4):
            here = [r for r, chosen in zip(right, exits, strict=True) if chosen == e]
            assert got.rates[i, e] == pytest.approx(len(here) / 80)
            if here:
                assert got.exit_accuracy[i, e] == pytest.approx(np.mean(here))
            else:
                assert np.isnan(got.exit_accuracy[i, e])
                assert got.rows()[i]["exit_accuracy"][e] is None


def test_sweep_with_many_equal_scores():
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 4, (50, 3)) / 4
    correct = rng.uniform(size=(4, 50)) < 0.6
    got = sweep(scores, correct, COSTS)
    assert got.thresholds.tolist() == [0.0, 0.125, 0.375, 0.625, NEVER]
    for i, threshold in enumerate(got.thresholds):
        exits = route(scores, threshold)
        assert got.accuracy[i] == pytest.approx(np.mean(correct[exits, np.arange(50)]))


@pytest.mark.parametrize("seed", range(2))
def test_cost_never_falls_with_the_threshold(seed):
    outputs = outputs_of(seed, n=300)
    curve = sweep_policy(outputs, ExitPolicy("gate"), thresholds=None)
    assert (np.diff(curve.cost) >= 0).all()
    assert curve.cost[0] == 100 and curve.cost[-1] == pytest.approx(400)
    assert curve.accuracy[-1] == pytest.approx(outputs.correct[-1].mean())
    assert curve.accuracy[0] == pytest.approx(outputs.correct[0].mean())


def test_breakpoints_are_all_that_matters():
    outputs = outputs_of()
    scores = outputs.scores(ExitPolicy("gate"))
    routings = {tuple(route(scores, t)) for t in breakpoints(scores)}
    fine = {tuple(route(scores, t)) for t in np.unique(scores.astype(float))}
    assert fine <= routings


def test_thresholds_stand_in_the_middle_of_the_gaps():
    scores = np.array([[0.2, 0.5], [0.6, 0.1], [0.2, 0.7]], dtype=np.float32)
    got = breakpoints(scores)  # running maxima: 0.2, 0.5, 0.6, 0.7
    np.testing.assert_allclose(got, [0.1, 0.35, 0.55, 0.65, NEVER], atol=1e-6)
    # Rounding errors of another runtime, up to a tenth of the least gap, change no routing.
    rng = np.random.default_rng(0)
    scores = rng.permutation(np.linspace(0.01, 0.99, 120)).reshape(40, 3)
    noisy = scores + rng.uniform(-1e-3, 1e-3, scores.shape)
    fractions = budget_fractions(1.0, 4)
    for thresholds in [*breakpoints(scores), budget_thresholds(scores, fractions)]:
        assert route(scores, thresholds) == route(noisy, thresholds)


@pytest.mark.parametrize("first", [0.1, 0.5, 0.999, 1e-30])
def test_a_threshold_between_neighbours_of_float32(first):
    a = np.float32(first)
    b = np.nextafter(a, np.float32(2))  # no float32 number lies between them
    got = float(between(a, b))
    assert np.float32(got) == got and a < got <= b
    assert bool(torch.tensor(b) >= got) and not bool(torch.tensor(a) >= got)
    assert float(between(0.2, 0.3)) == pytest.approx(0.25)


def test_a_sweep_of_all_breakpoints_is_fast():
    rng = np.random.default_rng(0)
    scores, correct = rng.uniform(size=(10_000, 4)), rng.uniform(size=(5, 10_000)) < 0.8
    start = time.perf_counter()
    curve = sweep(scores, correct, np.arange(1.0, 6.0))
    assert len(curve.thresholds) > 10_000
    assert time.perf_counter() - start < 2  # a loop over samples takes minutes


@pytest.mark.parametrize("budget", [100.0, 137.0, 222.2, 399.0, 400.0, 1000.0])
def test_solver_for_a_cost_against_all_thresholds(budget):
    calibration, test = outputs_of(0), outputs_of(1)
    policy = ExitPolicy("gate")
    scores = calibration.scores(policy)
    candidates = [*np.unique(scores.astype(float)), NEVER]
    best = max(
        cost
        for t in candidates
        if (cost := account(calibration, route(scores, t))[1]) <= budget + 1e-9
    )
    found = solve_for_cost(policy, calibration, mean_cost=budget, test=test)
    assert found.calibration["cost"] == pytest.approx(best)
    assert found.calibration["cost"] <= budget + 1e-9
    threshold = found.policy.threshold(0)
    accuracy, cost, _ = account(test, route(test.scores(policy), threshold))
    assert found.test["accuracy"] == pytest.approx(accuracy)
    assert found.test["cost"] == pytest.approx(cost)
    # one more sample further on would have been too much: the budget is met within a step
    if budget < 400:
        assert budget - best <= 4 * 400 / 80


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 0.75, 0.8])
def test_solver_for_an_accuracy_against_all_thresholds(accuracy):
    calibration = outputs_of(0)
    policy = ExitPolicy("max_prob")
    scores = calibration.scores(policy)
    candidates = [*np.unique(scores.astype(float)), NEVER]
    accounts = [account(calibration, route(scores, t)) for t in candidates]
    cheapest = min(cost for acc, cost, _ in accounts if acc >= accuracy - 1e-9)
    found = solve_for_accuracy(policy, calibration, accuracy=accuracy)
    assert found.calibration["accuracy"] >= accuracy - 1e-9
    assert found.calibration["cost"] == pytest.approx(cheapest)
    assert found.test is None


def test_solvers_say_what_cannot_be_met():
    calibration = outputs_of()
    with pytest.raises(ValueError, match="budget is 99 MACs; expected 100"):
        solve_for_cost(ExitPolicy("gate"), calibration, mean_cost=99)
    with pytest.raises(ValueError, match="accuracy asked for is 1; expected at most 0.8"):
        solve_for_accuracy(ExitPolicy("gate"), calibration, accuracy=1.0)


def test_calibration_data_is_no_test_data():
    same = outputs_of(0)
    with pytest.raises(ValueError, match="on the same samples"):
        solve_for_cost(ExitPolicy("gate"), outputs_of(0), mean_cost=200, test=same)
    with pytest.raises(ValueError, match="on the same samples"):
        budgeted_batch(ExitPolicy("gate"), outputs_of(0), same)


def test_budget_fractions():
    np.testing.assert_allclose(budget_fractions(1.0, 4), 0.25)
    np.testing.assert_allclose(budget_fractions(0.5, 3), np.array([4, 2, 1]) / 7)
    with pytest.raises(ValueError, match="exit ratio is 0"):
        budget_fractions(0, 4)


def budget_reference(scores, fractions):
    """The published protocol as a loop over sorted samples (no ties)."""
    n, gates = scores.shape
    gone, thresholds = set(), []
    for e in range(gates):
        wanted, threshold = int(np.floor(fractions[e] * n)), NEVER
        taken = 0
        for i in sorted(range(n), key=lambda i: -scores[i, e]):
            if i in gone:
                continue
            if taken == wanted:
                break
            taken += 1
            threshold = scores[i, e]
        thresholds.append(threshold)
        gone |= {i for i in range(n) if scores[i, e] >= threshold}
    return thresholds


@pytest.mark.parametrize("q", [0.05, 0.5, 1.0, 1.95])
def test_budget_thresholds_equal_the_loop(q):
    scores = np.random.default_rng(7).uniform(size=(200, 3))
    fractions = budget_fractions(q, 4)
    got = budget_thresholds(scores, fractions)
    reference = budget_reference(scores, fractions)  # the least score of those who leave
    exits = np.array(route(scores, got))
    assert exits.tolist() == route(scores, reference)
    assert all(t < r or t == NEVER for t, r in zip(got, reference, strict=True))
    for e in range(3):
        assert (exits == e).sum() == int(fractions[e] * 200)


def test_budgeted_batch_curve():
    calibration, test = outputs_of(0, n=400), outputs_of(1, n=400)
    policy = ExitPolicy("max_prob")
    rows = budgeted_batch(policy, calibration, test)
    assert len(rows) == 39 and rows[0]["q"] == 0.05 and rows[-1]["q"] == 1.95
    scores = test.scores(policy)
    for row in rows[::6]:
        accuracy, cost, _ = account(test, route(scores, row["thresholds"]))
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["cost"] == pytest.approx(cost)
    costs = [row["cost"] for row in rows]
    assert costs[0] < 150 and costs[-1] > 280
    assert np.corrcoef(costs, range(39))[0, 1] > 0.95


def test_temperatures_are_the_best_of_each_exit():
    calibration = outputs_of(n=400, scale=3.0)  # three times too sure
    got = fit_temperatures(calibration)
    for e, temperature in enumerate(got):
        z = calibration.logits[e].astype(np.float64)

        def nll(t, z=z):
            scaled = z / t - (z / t).max(axis=1, keepdims=True)
            log_p = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
            return -log_p[np.arange(len(z)), calibration.labels].mean()

        best = minimize_scalar(nll, bounds=(0.05, 50), method="bounded", options={"xatol": 1e-6})
        assert temperature == pytest.approx(best.x, rel=1e-3)
        assert temperature > 1
    policy = calibrated_policy(ExitPolicy("entropy", [0.1, 0.2, 0.3]), calibration)
    assert policy.temperatures == got and policy.thresholds == (0.1, 0.2, 0.3)


def test_sweep_checks_shapes():
    with pytest.raises(ValueError, match="scores have shape"):
        sweep(np.zeros((3, 2)), np.zeros((2, 3), bool), COSTS[:3])
    with pytest.raises(ValueError, match="2 exit fractions"):
        budget_thresholds(np.zeros((3, 2)), np.array([0.5, 0.5]))
