"""Verification rates against sorting all pairs, and the published worked example."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from shared_core import metrics
from shared_core.metrics import verification

REPO = Path(__file__).resolve().parents[2]
TARGETS = (1.0, 0.5, 0.1, 0.03, 1e-2, 1e-3, 1e-5, 0.0)


def _brute(features, genuine, targets):
    """Every pair in a list; thresholds by sorting. ``features`` are scored in float64."""
    i, j = np.triu_indices(len(features), 1)
    scores = (features.astype(np.float64)[i] * features.astype(np.float64)[j]).sum(1)
    good, bad = np.sort(scores[genuine]), np.sort(scores[~genuine])[::-1]
    rates, fars, thresholds = [], [], []
    for target in targets:
        allowed = int(Fraction(str(target)) * len(bad))  # exact floor of the decimal fraction
        limit = bad[allowed] if allowed < len(bad) else -np.inf
        rates.append(np.mean(good > limit))
        fars.append(np.mean(bad > limit))
        thresholds.append(limit)
    return rates, fars, thresholds


def _pairs(labels):
    i, j = np.triu_indices(len(labels), 1)
    return labels[i] == labels[j]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_equals_brute_force_with_many_ties_and_both_signs(block, dtype):
    rng = np.random.default_rng(0)
    features = rng.integers(-3, 4, (61, 4))  # whole numbers: products are exact and tie often
    labels = rng.integers(0, 6, 61)
    got = metrics.verification_rate(
        features, labels, far_targets=TARGETS, block=block, normalize=False, dtype=dtype
    )
    rates, fars, thresholds = _brute(features, _pairs(labels), TARGETS)
    np.testing.assert_array_equal(got.rates, rates)
    np.testing.assert_array_equal(got.far, fars)
    np.testing.assert_array_equal(got.thresholds, thresholds)
    assert got.genuine == _pairs(labels).sum()
    assert got.genuine + got.impostor == 61 * 60 // 2
    assert (got.far <= np.array(TARGETS) + 1e-12).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_brute_force_on_cosines(dtype):
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(30, 16))
    labels = np.repeat(np.arange(30), 8)
    features = centres[labels] + rng.normal(size=(240, 16))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    got = metrics.verification_rate(features, labels, far_targets=TARGETS, block=50, dtype=dtype)
    rates, _, thresholds = _brute(unit, _pairs(labels), TARGETS)
    # float32 may round a score across a threshold: at most one of the 840 genuine pairs each.
    np.testing.assert_allclose(got.rates, rates, atol=0 if dtype == np.float64 else 1.01 / 840)
    np.testing.assert_allclose(got.thresholds, thresholds, rtol=1e-5)


def test_float32_and_float64_agree_where_scores_are_exact():
    rng = np.random.default_rng(2)
    features, labels = rng.integers(-8, 9, (80, 6)), rng.integers(0, 9, 80)
    single, double = (
        metrics.verification_rate(features, labels, normalize=False, dtype=d, block=33)
        for d in (np.float32, np.float64)
    )
    np.testing.assert_array_equal(single.rates, double.rates)
    np.testing.assert_array_equal(single.thresholds, double.thresholds)


def test_the_worked_example_of_the_landmark_project():
    state = np.random.RandomState(0)
    centres = state.randn(40, 32)
    features = np.repeat(centres, 10, 0) + state.randn(400, 32)
    labels = np.repeat(np.arange(40), 10)
    got = metrics.verification_rate(features, labels, far_targets=[10.0**-k for k in range(1, 6)])
    assert (got.genuine, got.impostor) == (1800, 78_000)
    np.testing.assert_allclose(
        got.rates.round(5), [0.96278, 0.74556, 0.435, 0.19944, 0.00333], atol=1e-9
    )


def test_separable_features_are_always_verified_and_random_ones_at_the_false_accept_rate():
    labels = np.repeat(np.arange(20), 5)
    perfect = metrics.verification_rate(np.eye(20)[labels], labels)
    np.testing.assert_array_equal(perfect.rates, 1)
    np.testing.assert_array_equal(perfect.far, 0)
    noise = np.random.default_rng(3).normal(size=(1200, 24))
    got = metrics.verification_rate(noise, np.arange(1200) // 20, far_targets=(0.5, 0.1, 0.01))
    # 11,400 genuine pairs: four standard deviations.
    np.testing.assert_allclose(got.rates, got.far, atol=0.02)


def test_coarse_and_fine_truths_in_one_sweep_equal_two():
    rng = np.random.default_rng(4)
    features, fine = rng.integers(-5, 6, (90, 5)), rng.integers(0, 30, 90)
    both = metrics.verification_rates(
        features, {"fine": fine, "coarse": fine // 5}, block=20, normalize=False
    )
    for name, labels in (("fine", fine), ("coarse", fine // 5)):
        alone = metrics.verification_rate(features, labels, block=64, normalize=False)
        np.testing.assert_array_equal(both[name].rates, alone.rates)
        np.testing.assert_array_equal(both[name].thresholds, alone.thresholds)


@pytest.mark.parametrize("block", [1, 13, 64, 200])
def test_a_pair_mask_says_the_same_as_labels(block):
    rng = np.random.default_rng(5)
    features, labels = rng.normal(size=(70, 5)), rng.integers(0, 9, 70)
    mask = metrics.PairMask(_pairs(labels).astype(np.uint8))
    by_mask = metrics.verification_rate(features, mask, block=block, far_targets=TARGETS)
    by_label = metrics.verification_rate(features, labels, block=block, far_targets=TARGETS)
    np.testing.assert_array_equal(by_mask.rates, by_label.rates)
    assert by_mask.genuine == by_label.genuine


def test_a_pair_mask_need_not_be_transitive():
    features = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    mask = metrics.PairMask(np.array([1, 0, 1]))  # 0-1 and 1-2 belong together, 0-2 do not
    got = metrics.verification_rate(features, mask, far_targets=(0.0,))
    assert got.rates == [1.0] and got.thresholds == [0.0]


def test_zero_scores_of_both_signs_are_one_tie():
    features = np.array([[1.0, 0.0], [-0.0, 1.0], [-1.0, -0.0], [0.0, -1.0]])
    got = metrics.verification_rate(features, [0, 0, 1, 1], far_targets=(0.0, 0.25))
    # Impostor scores: 0-2 -1, 0-3 0, 1-2 0, 1-3 -1; genuine: both 0, so equal to the limit.
    assert got.rates.tolist() == [0, 0] and got.thresholds.tolist() == [0, 0]


def test_memory_does_not_grow_with_the_number_of_pairs():
    """6,000 features have 18 million pairs: 72 MB of scores, if they were kept."""
    code = """
import resource, numpy as np
from shared_core import metrics
from shared_core.metrics import verification
f = np.random.default_rng(0).standard_normal((6000, 8), dtype=np.float32)
metrics.verification_rate(f[:600], np.arange(600) // 10, block=256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
metrics.verification_rate(f, np.arange(6000) // 10, block=256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(REPO / "shared"), "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) < 30_000  # KiB


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.verification_rate(np.zeros((3, 2)), [0, 0]), "2 labels"),
        (lambda: metrics.verification_rate(np.zeros(3), [0, 0, 1]), "shape"),
        (lambda: metrics.verification_rate(np.zeros((1, 2)), [0]), "at least 2"),
        (lambda: metrics.verification_rate(np.full((2, 2), np.nan), [0, 1]), "NaN"),
        (lambda: metrics.verification_rate(np.ones((3, 2)), [0, 1, 2]), "no genuine"),
        (lambda: metrics.verification_rate(np.ones((3, 2)), [0, 0, 0]), "no impostor"),
        (lambda: metrics.verification_rate(np.ones((3, 2)), [0, 0, 1], block=0), "block"),
        (lambda: metrics.verification_rate(np.ones((3, 2)), [0, 0, 1], dtype=np.float16), "dtype"),
        (lambda: metrics.verification_rate(np.ones((3, 2)), [0, 0, 1], far_targets=(2,)), "far"),
        (lambda: metrics.verification_rate(np.ones((3, 2)), [0, 0, 1], far_targets=()), "far"),
        (lambda: metrics.verification_rates(np.ones((3, 2)), {}), "truths"),
        (
            lambda: metrics.verification_rate(np.ones((4, 2)), metrics.PairMask(np.ones(4))),
            "mask has shape",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_target_of_one_accepts_everything():
    got = metrics.verification_rate(np.eye(3), [0, 0, 1], far_targets=(1.0,))
    assert got.rates == [1.0] and got.far == [1.0] and got.thresholds == [-np.inf]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keys_order_as_scores_do_and_go_back(dtype):
    rng = np.random.default_rng(6)
    scores = np.concatenate([rng.normal(size=500), rng.normal(size=50) * 1e-40, [0.0, 1, -1]])
    scores = np.sort(scores.astype(dtype))
    keys = verification._keys(scores)
    np.testing.assert_array_equal(keys[1:] > keys[:-1], scores[1:] > scores[:-1])
    zeros = verification._keys(np.array([-0.0, 0.0], dtype))
    assert zeros[0] == zeros[1]
    back = [verification._score(int(key), np.dtype(dtype)) for key in keys]
    np.testing.assert_array_equal(back, scores.astype(np.float64))


def test_allowed_false_accepts_are_the_floor_of_the_decimal_fraction():
    for text in ("0.29", "0.57", "0.1", "0.001", "1e-5", "0.333"):
        for impostors in (7, 100, 1000, 78_000, 708_535_000):
            expected = int(Fraction(text) * impostors)
            assert verification._allowed(float(text), impostors) == expected, (text, impostors)
