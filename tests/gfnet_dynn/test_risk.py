"""Risk control: p-values by hand, the promise by simulation."""

import math

import numpy as np
import pytest

from gfnet_dynn.exit_evaluation import ExitLogits, first_exit_at, never_leaves
from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy
from gfnet_dynn.risk import (
    binomial_p_value,
    control_risk,
    exit_risk_losses,
    hoeffding_bentkus_p_value,
    risk_controlled_policy,
)


def binomial_tail(count, n, p):
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(count + 1))


@pytest.mark.parametrize(("count", "n", "level"), [(0, 20, 0.1), (3, 50, 0.1), (40, 50, 0.7)])
def test_binomial_p_value_by_summing(count, n, level):
    want = binomial_tail(count, n, level)
    assert binomial_p_value(count, n, level) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("risk", "n", "level"), [(0.0, 100, 0.1), (0.05, 100, 0.1), (0.07, 100, 0.1), (0.2, 30, 0.1),
                             (0.025, 200, 0.05), (1.0, 10, 0.3)]
)  # fmt: skip
def test_hoeffding_bentkus_by_hand(risk, n, level):
    r = min(risk, level)
    kl = 0.0
    if r > 0:
        kl += r * math.log(r / level)
    if r < 1:
        kl += (1 - r) * math.log((1 - r) / (1 - level))
    bentkus = math.e * binomial_tail(min(math.ceil(round(n * risk, 6)), n), n, level)
    want = min(math.exp(-n * kl), bentkus, 1.0)
    assert hoeffding_bentkus_p_value(risk, n, level) == pytest.approx(want, rel=1e-6)


def test_p_values_fall_with_the_evidence():
    risks = np.linspace(0, 0.2, 21)
    p = hoeffding_bentkus_p_value(risks, 100, 0.1)
    assert (np.diff(p) >= -1e-12).all() and p[0] < 1e-4 and p[-1] == 1
    assert hoeffding_bentkus_p_value(0.05, 1000, 0.1) < hoeffding_bentkus_p_value(0.05, 100, 0.1)
    # exact is never worse than the bound for losses of 0 and 1
    for count in range(20):
        bound = hoeffding_bentkus_p_value(count / 100, 100, 0.1)
        assert binomial_p_value(count, 100, 0.1) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["regret", "consistency", "error"])
def test_losses_by_a_loop(kind):
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 3, (4, 60)), rng.integers(0, 3, 60)
    exit_index = rng.integers(0, 4, 60)
    got = exit_risk_losses(predictions, labels, exit_index, kind)
    for i in range(60):
        early, full = predictions[exit_index[i], i], predictions[3, i]
        want = {
            "regret": full == labels[i] and early != labels[i],
            "consistency": early != full,
            "error": early != labels[i],
        }[kind]
        assert got[i] == want


def test_regret_bounds_the_accuracy_that_is_lost():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        predictions, labels = rng.integers(0, 3, (4, 60)), rng.integers(0, 3, 60)
        exit_index = rng.integers(0, 4, 60)
        early = predictions[exit_index, np.arange(60)] == labels
        lost = (predictions[3] == labels).mean() - early.mean()
        assert exit_risk_losses(predictions, labels, exit_index, "regret").mean() >= lost


class World:
    """A population whose risks are known: confident exits are more often right."""

    def __init__(self, size=200_000, seed=0):
        rng = np.random.default_rng(seed)
        difficulty = rng.uniform(size=size)
        self.labels = np.zeros(size, int)
        # An exit of index e errs with a probability that grows with difficulty, less so later.
        draws = rng.uniform(size=(3, size))
        error = np.stack([0.55 * difficulty**2, 0.25 * difficulty**2, 0.04 + 0 * difficulty])
        self.predictions = (draws < error).astype(int)
        noise = rng.normal(size=(size, 2)) * 0.1
        self.scores = np.clip(1 - difficulty[:, None] + noise, 0, 1)

    def true_risk(self, threshold, kind):
        exit_index = first_exit_at(self.scores, threshold)
        return exit_risk_losses(self.predictions, self.labels, exit_index, kind).mean()


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.mark.parametrize(
    ("kind", "level"), [("regret", 0.02), ("consistency", 0.05), ("error", 0.08)]
)
def test_the_promise_holds(world, kind, level):
    rng = np.random.default_rng(1)
    grid = np.linspace(0, 1, 41)
    truth = {float(t): world.true_risk(t, kind) for t in (*grid, never_leaves(2))}
    broken, opened, trials = 0, 0, 200
    for _ in range(trials):
        rows = rng.integers(0, len(world.labels), 400)
        found = control_risk(
            world.scores[rows], world.predictions[:, rows], world.labels[rows],
            level=level, confidence_level=0.8, kind=kind, candidates=grid,
        )  # fmt: skip
        if found.num_accepted:
            broken += truth[found.threshold] > level
            opened += found.threshold < 1
    # 20 % may break it: three standard deviations above that, and not because nothing opens
    assert broken / trials <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / trials)
    assert opened > 0.8 * trials


def test_it_returns_the_last_of_the_unbroken_run(world):
    rows = np.arange(1000)
    grid = np.linspace(0, 1, 21)
    found = control_risk(
        world.scores[rows], world.predictions[:, rows], world.labels[rows],
        level=0.03, confidence_level=0.9, candidates=grid,
    )  # fmt: skip
    want, accepted = never_leaves(2), 0
    for t in [never_leaves(2), *grid[::-1]]:
        exit_index = first_exit_at(world.scores[rows], t)
        losses = exit_risk_losses(
            world.predictions[:, rows], world.labels[rows], exit_index, "regret"
        )
        if binomial_tail(int(losses.sum()), 1000, 0.03) > 0.1:
            break
        want, accepted = t, accepted + 1
        risk = losses.mean()
    assert 0 < want < 1
    assert (found.threshold, found.num_accepted) == (want, accepted)
    assert found.calibration_risk == pytest.approx(risk)
    assert found.num_tested == accepted + 1


def test_more_caution_never_leaves_earlier(world):
    rows = np.arange(2000)
    args = world.scores[rows], world.predictions[:, rows], world.labels[rows]
    by_level = [control_risk(*args, level=v).threshold for v in (0.01, 0.03, 0.1, 0.5)]
    assert by_level == sorted(by_level, reverse=True) and by_level[0] > by_level[-1]
    by_confidence = [
        control_risk(*args, level=0.05, confidence_level=v).threshold for v in (0.99, 0.9, 0.5)
    ]
    assert by_confidence == sorted(by_confidence, reverse=True)
    exact = control_risk(*args, level=0.05).threshold
    bound = control_risk(*args, level=0.05, p_value="hoeffding-bentkus").threshold
    assert exact <= bound


def test_too_few_samples_never_leave_early(world):
    rows = np.arange(20)  # 0.99 ** 20 = 0.82: no evidence for a risk below 1 %
    found = control_risk(
        world.scores[rows], world.predictions[:, rows], world.labels[rows], level=0.01
    )
    assert found.threshold == never_leaves(2) and found.num_accepted == 0
    assert set(first_exit_at(world.scores[rows], found.threshold)) == {2}


def test_policy_with_a_controlled_threshold():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    logits = rng.normal(size=(3, 500, 4))
    logits[:, np.arange(500), labels] += np.array([2.0, 3.0, 5.0])[:, None]
    outputs = ExitLogits(
        logits.astype(np.float32), np.zeros((500, 2), np.float32), labels,
        np.array([1.0, 2.0, 3.0]), (0, 1),
    )  # fmt: skip
    policy, found = risk_controlled_policy(
        ExitPolicy("max_prob", temperatures=1.2), outputs, level=0.05, confidence_level=0.9
    )
    assert policy.thresholds == (found.threshold,) and policy.temperatures == (1.2,)
    assert 0 < found.threshold < 1
    exit_index = outputs.select(policy)
    losses = exit_risk_losses(outputs.predictions, labels, exit_index, "regret")
    assert losses.mean() == pytest.approx(found.calibration_risk) and losses.mean() < 0.05
    assert found.as_dict()["kind"] == "regret"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.0}, "risk level is 0.0"),
        ({"level": 0.1, "confidence_level": 1.0}, "confidence is 1.0"),
        ({"level": 0.1, "kind": "loss"}, "unknown risk 'loss'"),
        ({"level": 0.1, "p_value": "t"}, "unknown p-value 't'"),
    ],
)
def test_refusals(world, options, message):
    rows = np.arange(10)
    with pytest.raises(ValueError, match=message):
        control_risk(world.scores[rows], world.predictions[:, rows], world.labels[rows], **options)
    with pytest.raises(ValueError, match="0 calibration samples"):
        binomial_p_value(0, 0, 0.1)
