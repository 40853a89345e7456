"""Conformal sets: quantiles by hand, coverage by simulation."""

import json
import math

import numpy as np
import pytest

from gfnet_dynn.conformal import (
    FAMILIES,
    ConformalSets,
    calibrate,
    conformal_metrics,
    conformal_quantile,
    lac_scores,
)


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


@pytest.mark.parametrize("family", ["general", "gated_strict", "gated"])
def test_coverage_when_easy_samples_leave_early(family):
    overall, per_exit = coverages(family, by_confidence=True)
    assert overall.mean() >= 1 - ALPHA - margin(overall)
    if family == "gated_strict":  # at every exit, the final head included
        assert (per_exit >= 1 - ALPHA - 0.015).all()


def test_quantiles_of_all_samples_promise_too_much_at_the_end():
    """Why gated_all is not the family to trust: the hard samples are alone at the last head."""
    _, per_exit = coverages("gated_all", by_confidence=True)
    assert per_exit[0] > 1 - ALPHA and per_exit[-1] < 1 - ALPHA - 0.03


def test_each_family_pools_what_it_says():
    rng = np.random.default_rng(3)
    p, labels, _ = draw(rng, 100, by_confidence=False)
    exit_index = np.array([0] * 60 + [1] * 25 + [2] * 15)  # the last has too few for "gated"
    scores = np.stack([lac_scores(q, labels) for q in p])
    everyone = [conformal_quantile(s, 0.1) for s in scores]
    leaving = [conformal_quantile(scores[e, exit_index == e], 0.1) for e in range(3)]
    own = conformal_quantile(scores[exit_index, np.arange(100)], 0.1)
    want = {
        "general": [own] * 3,
        "gated_all": everyone,
        "gated_strict": leaving,
        "gated": [*leaving[:2], everyone[2]],
    }
    for family, quantiles in want.items():
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


def test_the_calibration_samples_are_no_test():
    rng = np.random.default_rng(0)
    calibration = draw(rng, 50, by_confidence=True)
    fitted = calibrate(*calibration, alpha=0.1, family="general")
    with pytest.raises(ValueError, match="own calibration samples"):
        fitted.evaluate(*calibration)
    with pytest.raises(ValueError, match="own calibration samples"):
        conformal_metrics(calibration, calibration)


def test_state_is_plain_json():
    rng = np.random.default_rng(0)
    p, labels, _ = draw(rng, 50, by_confidence=True)
    fitted = calibrate(p, labels, np.zeros(50, int), alpha=0.1, family="gated_strict")
    back = ConformalSets.from_state_dict(json.loads(json.dumps(fitted.state_dict())))
    assert back == fitted and back.quantiles[2] == math.inf


def test_metric_names():
    rng = np.random.default_rng(0)
    calibration, test = (draw(rng, 200, by_confidence=True) for _ in range(2))
    got = conformal_metrics(calibration, test)
    assert len(got) == 4 * 9 * 2
    assert {"sets_general_C_0.01", "sets_gated_strict_emp_alpha_0.045"} <= set(got)
    for family in FAMILIES:  # a stricter promise makes larger sets
        sizes = [got[f"sets_{family}_C_{a:g}"] for a in (0.01, 0.03, 0.05)]
        assert sizes == sorted(sizes, reverse=True)


def test_refusals():
    rng = np.random.default_rng(0)
    p, labels, exit_index = draw(rng, 20, by_confidence=True)
    with pytest.raises(ValueError, match="unknown family 'all'"):
        calibrate(p, labels, exit_index, alpha=0.1, family="all")
    with pytest.raises(ValueError, match="19 labels and 20 exits of 20 samples"):
        calibrate(p, labels[:19], exit_index, alpha=0.1, family="general")
