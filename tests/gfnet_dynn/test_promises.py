"""What is promised: p-values and quantiles by hand, risk and coverage by simulation."""

import math

import numpy as np
import pytest

from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.decide.promises import (
    FAMILIES,
    binomial_p_value,
    calibrate,
    conformal_quantile,
    control_risk,
    lac_scores,
    regret,
    risk_controlled_policy,
)
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy, first_reached


def binomial_tail(count, n, p):
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(count + 1))


@pytest.mark.parametrize(("count", "n", "level"), [(0, 20, 0.1), (3, 50, 0.1), (40, 50, 0.7)])
def test_binomial_p_value_by_summing(count, n, level):
    want = binomial_tail(count, n, level)
    assert binomial_p_value(count, n, level) == pytest.approx(want, rel=1e-9)


def test_regret_by_a_loop():
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 3, (4, 60)), rng.integers(0, 3, 60)
    exit_index = rng.integers(0, 4, 60)
    got = regret(predictions, labels, exit_index)
    for i in range(60):
        early, full = predictions[exit_index[i], i], predictions[3, i]
        assert got[i] == (full == labels[i] and early != labels[i])
    early = predictions[exit_index, np.arange(60)] == labels
    assert got.mean() >= (predictions[3] == labels).mean() - early.mean()


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

    def true_risk(self, threshold):
        exit_index = first_reached(self.scores, threshold)
        return regret(self.predictions, self.labels, exit_index).mean()


@pytest.fixture(scope="module")
def world():
    return World()


def test_the_promise_holds(world):
    rng = np.random.default_rng(1)
    grid = np.linspace(0, 1, 41)
    truth = {float(t): world.true_risk(t) for t in (*grid, NEVER)}
    broken, opened, trials = 0, 0, 200
    for _ in range(trials):
        rows = rng.integers(0, len(world.labels), 400)
        found = control_risk(
            world.scores[rows], world.predictions[:, rows], world.labels[rows],
            level=0.02, confidence_level=0.8, candidates=grid,
        )  # fmt: skip
        if found.num_accepted:
            broken += truth[found.threshold] > 0.02
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
    want, accepted = NEVER, 0
    for t in [NEVER, *grid[::-1]]:
        exit_index = first_reached(world.scores[rows], t)
        losses = regret(world.predictions[:, rows], world.labels[rows], exit_index)
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


def test_too_few_samples_never_leave_early(world):
    rows = np.arange(20)  # 0.99 ** 20 = 0.82: no evidence for a risk below 1 %
    found = control_risk(
        world.scores[rows], world.predictions[:, rows], world.labels[rows], level=0.01
    )
    assert found.threshold == NEVER and found.num_accepted == 0
    assert set(first_reached(world.scores[rows], found.threshold)) == {2}


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
    losses = regret(outputs.predictions, labels, exit_index)
    assert losses.mean() == pytest.approx(found.calibration_risk) and losses.mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.0}, "risk level is 0.0"),
        ({"level": 0.1, "confidence_level": 1.0}, "confidence is 1.0"),
    ],
)
def test_risk_refusals(world, options, message):
    rows = np.arange(10)
    with pytest.raises(ValueError, match=message):
        control_risk(world.scores[rows], world.predictions[:, rows], world.labels[rows], **options)
    with pytest.raises(ValueError, match="0 calibration samples"):
        binomial_p_value(0, 0, 0.1)


# --- conformal sets


def test_scores_are_one_minus_the_true_probability():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    np.testing.assert_allclose(lac_scores(p, np.array([0, 1])), [0.3, 0.7])


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [(9, 0.1, 9), (19, 0.1, 18), (99, 0.05, 95), (100, 0.05, 96), (10, 0.5, 6), (4, 0.2, 4)],
)
def test_quantile_is_the_right_order_statistic(n, alpha, rank):
    scores = np.random.default_rng(n).permutation(np.arange(1, n + 1) / n)
    assert conformal_quantile(scores, alpha) == rank / n


@pytest.mark.parametrize(("n", "alpha"), [(0, 0.1), (8, 0.1), (18, 0.05), (98, 0.01)])
def test_too_few_samples_promise_nothing_but_all_classes(n, alpha):
    assert conformal_quantile(np.zeros(n), alpha) == math.inf
    assert conformal_quantile(np.zeros(round(1 / alpha) - 1), alpha) == 0.0


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_alpha_is_a_fraction(alpha):
    with pytest.raises(ValueError, match="expected a fraction between 0 and 1"):
        conformal_quantile(np.zeros(3), alpha)


def draw(rng, n, *, k=4, exits=3, by_confidence):
    """Exchangeable samples; the exit is chosen at random or by confidence (easy ones early)."""
    labels = rng.integers(0, k, n)
    z = rng.normal(size=(exits, n, k))
    difficulty = rng.uniform(0, 3, n)
    z[:, np.arange(n), labels] += (3.5 - difficulty) + np.arange(exits)[:, None] * 0.4
    p = np.exp(z - z.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    if by_confidence:
        open_gate = p[:-1].max(axis=2) > 0.85
        exit_index = np.vstack([open_gate, np.ones((1, n), bool)]).argmax(axis=0)
    else:
        exit_index = rng.choice(exits, n, p=[0.5, 0.3, 0.2])
    return p, labels, exit_index


ALPHA, TRIALS, N_CAL, N_TEST = 0.1, 120, 200, 400


def coverages(family, *, by_confidence, seed=0):
    """Coverage of each trial over all samples, and summed over the trials at each exit."""
    rng = np.random.default_rng(seed)
    overall, hits, counts = [], np.zeros(3), np.zeros(3)
    for _ in range(TRIALS):
        fitted = calibrate(*draw(rng, N_CAL, by_confidence=by_confidence), alpha=ALPHA,
                           family=family)  # fmt: skip
        p, labels, exit_index = draw(rng, N_TEST, by_confidence=by_confidence)
        covered = fitted.sets(p, exit_index)[np.arange(N_TEST), labels]
        overall.append(covered.mean())
        hits += np.bincount(exit_index, weights=covered, minlength=3)
        counts += np.bincount(exit_index, minlength=3)
    return np.array(overall), hits / counts


def margin(overall):
    """Three standard errors of the mean over the trials."""
    return 3 * overall.std(ddof=1) / np.sqrt(len(overall))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_cover_when_the_exit_is_independent(family):
    overall, _ = coverages(family, by_confidence=False)
    assert overall.mean() >= 1 - ALPHA - margin(overall)
    # and not by giving out every class: exchangeability bounds it from above, 1/(n+1) an exit
    assert overall.mean() <= 1 - ALPHA + margin(overall) + 3 / (0.2 * N_CAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_when_easy_samples_leave_early(family):
    overall, per_exit = coverages(family, by_confidence=True)
    assert overall.mean() >= 1 - ALPHA - margin(overall)
    if family == "gated_strict":  # at every exit, the final head included
        assert (per_exit >= 1 - ALPHA - 0.015).all()


def test_each_family_pools_what_it_says():
    rng = np.random.default_rng(3)
    p, labels, _ = draw(rng, 100, by_confidence=False)
    exit_index = np.array([0] * 60 + [1] * 25 + [2] * 15)
    scores = np.stack([lac_scores(q, labels) for q in p])
    own = conformal_quantile(scores[exit_index, np.arange(100)], 0.1)
    leaving = [conformal_quantile(scores[e, exit_index == e], 0.1) for e in range(3)]
    for family, quantiles in {"general": [own] * 3, "gated_strict": leaving}.items():
        got = calibrate(p, labels, exit_index, alpha=0.1, family=family)
        assert list(got.quantiles) == quantiles


def test_sets_and_measures_by_a_loop():
    rng = np.random.default_rng(1)
    fitted = calibrate(*draw(rng, 100, by_confidence=True), alpha=0.1, family="gated_strict")
    p, labels, exit_index = draw(rng, 50, by_confidence=True)
    sizes, hits = [], []
    for i in range(50):
        q = fitted.quantiles[exit_index[i]]
        members = [c for c in range(4) if 1 - p[exit_index[i], i, c] <= q]
        sizes.append(len(members))
        hits.append(labels[i] in members)
    got = fitted.evaluate(p, labels, exit_index)
    assert got["C"] == pytest.approx(np.mean(sizes))
    assert got["emp_alpha"] == pytest.approx(1 - np.mean(hits))
    for e in range(3):
        here = [h for h, chosen in zip(hits, exit_index, strict=True) if chosen == e]
        assert got["coverage_per_exit"][e] == pytest.approx(np.mean(here))


def test_an_empty_exit_gives_every_class():
    rng = np.random.default_rng(2)
    p, labels, _ = draw(rng, 100, by_confidence=False)
    nobody_at_one = np.array([0, 2] * 50)
    fitted = calibrate(p, labels, nobody_at_one, alpha=0.1, family="gated_strict")
    assert fitted.quantiles[1] == math.inf
    assert fitted.sets(p, np.ones(100, int)).all()
    p, labels, _ = draw(rng, 30, by_confidence=False)
    assert fitted.evaluate(p, labels, np.zeros(30, int))["coverage_per_exit"][1:] == [None, None]


def test_unknown_family():
    rng = np.random.default_rng(0)
    p, labels, exit_index = draw(rng, 20, by_confidence=True)
    with pytest.raises(ValueError, match="unknown family 'all'"):
        calibrate(p, labels, exit_index, alpha=0.1, family="all")
    with pytest.raises(ValueError, match="19 labels and 20 exits of 20 samples"):
        calibrate(p, labels[:19], exit_index, alpha=0.1, family="general")
