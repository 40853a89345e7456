"""Verification rates against sorting all pairs, and the published worked example."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from landmark_distill.images.truths import PairMask
from landmark_distill.judging import radix_search, scan_search, verification
from landmark_distill.judging.verification import verification_rates

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


def rates_of(features, truth, **more):
    """Of one truth."""
    return verification_rates(features, {"": truth}, **more)[""]


def _pairs(labels):
    i, j = np.triu_indices(len(labels), 1)
    return labels[i] == labels[j]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_equals_brute_force_with_many_ties_and_both_signs(block, dtype):
    rng = np.random.default_rng(0)
    features = rng.integers(-3, 4, (61, 4))  # whole numbers: products are exact and tie often
    labels = rng.integers(0, 6, 61)
    got = rates_of(features, labels, far_targets=TARGETS, block=block, normalize=False, dtype=dtype)
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
    got = rates_of(features, labels, far_targets=TARGETS, block=50, dtype=dtype)
    rates, _, thresholds = _brute(unit, _pairs(labels), TARGETS)
    # float32 may round a score across a threshold: at most one of the 840 genuine pairs each.
    np.testing.assert_allclose(got.rates, rates, atol=0 if dtype == np.float64 else 1.01 / 840)
    np.testing.assert_allclose(got.thresholds, thresholds, rtol=1e-5)


def test_float32_and_float64_agree_where_scores_are_exact():
    rng = np.random.default_rng(2)
    features, labels = rng.integers(-8, 9, (80, 6)), rng.integers(0, 9, 80)
    single, double = (
        rates_of(features, labels, normalize=False, dtype=d, block=33)
        for d in (np.float32, np.float64)
    )
    np.testing.assert_array_equal(single.rates, double.rates)
    np.testing.assert_array_equal(single.thresholds, double.thresholds)


def test_the_worked_example_of_the_landmark_project():
    state = np.random.RandomState(0)
    centres = state.randn(40, 32)
    features = np.repeat(centres, 10, 0) + state.randn(400, 32)
    labels = np.repeat(np.arange(40), 10)
    got = rates_of(features, labels, far_targets=[10.0**-k for k in range(1, 6)])
    assert (got.genuine, got.impostor) == (1800, 78_000)
    np.testing.assert_allclose(
        got.rates.round(5), [0.96278, 0.74556, 0.435, 0.19944, 0.00333], atol=1e-9
    )


def test_separable_features_are_always_verified_and_random_ones_at_the_false_accept_rate():
    labels = np.repeat(np.arange(20), 5)
    perfect = rates_of(np.eye(20)[labels], labels)
    np.testing.assert_array_equal(perfect.rates, 1)
    np.testing.assert_array_equal(perfect.far, 0)
    noise = np.random.default_rng(3).normal(size=(1200, 24))
    got = rates_of(noise, np.arange(1200) // 20, far_targets=(0.5, 0.1, 0.01))
    # 11,400 genuine pairs: four standard deviations.
    np.testing.assert_allclose(got.rates, got.far, atol=0.02)


def test_coarse_and_fine_truths_in_one_sweep_equal_two():
    rng = np.random.default_rng(4)
    features, fine = rng.integers(-5, 6, (90, 5)), rng.integers(0, 30, 90)
    both = verification_rates(
        features, {"fine": fine, "coarse": fine // 5}, block=20, normalize=False
    )
    for name, labels in (("fine", fine), ("coarse", fine // 5)):
        alone = rates_of(features, labels, block=64, normalize=False)
        np.testing.assert_array_equal(both[name].rates, alone.rates)
        np.testing.assert_array_equal(both[name].thresholds, alone.thresholds)


@pytest.mark.parametrize("block", [1, 13, 64, 200])
def test_a_pair_mask_says_the_same_as_labels(block):
    rng = np.random.default_rng(5)
    features, labels = rng.normal(size=(70, 5)), rng.integers(0, 9, 70)
    mask = PairMask(_pairs(labels).astype(np.uint8))
    by_mask = rates_of(features, mask, block=block, far_targets=TARGETS)
    by_label = rates_of(features, labels, block=block, far_targets=TARGETS)
    np.testing.assert_array_equal(by_mask.rates, by_label.rates)
    assert by_mask.genuine == by_label.genuine


def test_a_pair_mask_need_not_be_transitive():
    features = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    mask = PairMask(np.array([1, 0, 1]))  # 0-1 and 1-2 belong together, 0-2 do not
    got = rates_of(features, mask, far_targets=(0.0,))
    assert got.rates == [1.0] and got.thresholds == [0.0]


def test_zero_scores_of_both_signs_are_one_tie():
    features = np.array([[1.0, 0.0], [-0.0, 1.0], [-1.0, -0.0], [0.0, -1.0]])
    got = rates_of(features, [0, 0, 1, 1], far_targets=(0.0, 0.25))
    # Impostor scores: 0-2 -1, 0-3 0, 1-2 0, 1-3 -1; genuine: both 0, so equal to the limit.
    assert got.rates.tolist() == [0, 0] and got.thresholds.tolist() == [0, 0]


def test_memory_does_not_grow_with_the_number_of_pairs():
    """6,000 features have 18 million pairs: 72 MB of scores, if they were kept."""
    code = """
import resource, numpy as np
from landmark_distill.judging.verification import verification_rates
f = np.random.default_rng(0).standard_normal((6000, 8), dtype=np.float32)
verification_rates(f[:2000], {"": np.arange(2000) // 10}, block=256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
verification_rates(f, {"": np.arange(6000) // 10}, block=256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{REPO / 'packages'}:{REPO / 'shared'}", "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) < 30_000  # KiB


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rates_of(np.zeros((3, 2)), [0, 0]), "2 labels"),
        (lambda: rates_of(np.zeros(3), [0, 0, 1]), "shape"),
        (lambda: rates_of(np.zeros((1, 2)), [0]), "at least 2"),
        (lambda: rates_of(np.full((2, 2), np.nan), [0, 1]), "NaN"),
        (lambda: rates_of(np.ones((3, 2)), [0, 1, 2]), "no genuine"),
        (lambda: rates_of(np.ones((3, 2)), [0, 0, 0]), "no impostor"),
        (lambda: rates_of(np.ones((3, 2)), [0, 0, 1], block=0), "block"),
        (lambda: rates_of(np.ones((3, 2)), [0, 0, 1], dtype=np.float16), "dtype"),
        (lambda: rates_of(np.ones((3, 2)), [0, 0, 1], far_targets=(2,)), "far"),
        (lambda: rates_of(np.ones((3, 2)), [0, 0, 1], far_targets=()), "far"),
        (lambda: verification_rates(np.ones((3, 2)), {}), "truths"),
        (
            lambda: rates_of(np.ones((4, 2)), PairMask(np.ones(4))),
            "mask has shape",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_target_of_one_accepts_everything():
    got = rates_of(np.eye(3), [0, 0, 1], far_targets=(1.0,))
    assert got.rates == [1.0] and got.far == [1.0] and got.thresholds == [-np.inf]


def test_keys_order_as_scores_do_and_go_back():
    rng = np.random.default_rng(6)
    scores = np.concatenate([rng.normal(size=500), rng.normal(size=50) * 1e-310, [0.0, 1, -1]])
    scores = np.sort(scores)
    keys = radix_search._keys(scores)
    np.testing.assert_array_equal(keys[1:] > keys[:-1], scores[1:] > scores[:-1])
    zeros = radix_search._keys(np.array([-0.0, 0.0]))
    assert zeros[0] == zeros[1]
    back = [radix_search._score(int(key)) for key in keys]
    np.testing.assert_array_equal(back, scores)


def test_allowed_false_accepts_are_the_floor_of_the_decimal_fraction():
    for text in ("0.29", "0.57", "0.1", "0.001", "1e-5", "0.333"):
        for impostors in (7, 100, 1000, 78_000, 708_535_000):
            expected = int(Fraction(text) * impostors)
            assert radix_search.allowed(float(text), impostors) == expected, (text, impostors)


# -- one sweep with brackets ----------------------------------------------------------------------


@pytest.fixture
def scanning(monkeypatch):
    """Small sets take the way of large ones; says whether the scan or the radix answered."""
    monkeypatch.setattr(verification, "FEW_PAIRS", 0)
    monkeypatch.setattr(scan_search, "EXTRA", 4)
    answered = []

    def scan(*arguments, **named):
        found = scan_search.scan_search(*arguments, **named)
        answered.append("radix" if found is None else "scan")
        return found

    monkeypatch.setattr(verification, "scan_search", scan)
    return answered


def _clusters(rng, classes, per_class, width):
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    features = rng.normal(size=(classes, width))[labels] + rng.normal(size=(len(labels), width))
    # As the metric keeps them: unit length in float64, then rounded.
    features = features.astype(np.float32)
    return features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True).astype(
        np.float32
    ), labels


@pytest.mark.parametrize("block", [37, 128, 5000])
@pytest.mark.parametrize("sample", [60, 200, 4096])
def test_the_scan_gives_the_rates_of_float64_scores(scanning, monkeypatch, sample, block):
    """Not one pair may be off, although the sweep is in float32."""
    monkeypatch.setattr(scan_search, "SAMPLE", sample)
    features, labels = _clusters(np.random.default_rng(7), 60, 10, 48)
    got = rates_of(features, labels, far_targets=TARGETS, block=block, normalize=False)
    rates, fars, thresholds = _brute(features, _pairs(labels), TARGETS)
    assert scanning == ["scan"]
    np.testing.assert_array_equal(got.rates, rates)
    np.testing.assert_array_equal(got.far, fars)
    np.testing.assert_allclose(got.thresholds, thresholds, rtol=1e-14)


def test_scores_that_float32_cannot_tell_apart_are_ranked_by_float64(scanning):
    """An impostor at 1 - 1e-9, genuine pairs beside it by less than float32 can hold."""
    angles = np.array([0.0, 1.0, 1.0 + 3e-5, 3.0, 3.0 + 5e-5, 5.0, 5.0 + 4e-5])
    labels = np.array([9, 1, 1, 2, 2, 3, 4])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    wide = features.astype(np.float64)
    scores = wide @ wide.T
    good = np.array([scores[1, 2], scores[3, 4]])
    limit = scores[5, 6]
    single = features @ features.T
    got = rates_of(features, labels, far_targets=(0.0,), normalize=False)
    assert scanning == ["scan"]
    assert got.rates[0] == np.mean(good > limit) and got.thresholds[0] == limit
    assert len({single[1, 2], single[3, 4], single[5, 6]}) < 3  # float32 alone would see a tie


@pytest.mark.parametrize("block", [16, 70, 1000])
def test_the_scan_with_ties_masks_and_several_truths_equals_the_radix(scanning, block):
    rng = np.random.default_rng(8)
    features, fine = rng.integers(-3, 4, (300, 5)), rng.integers(0, 40, 300)
    mask = PairMask(rng.integers(0, 2, 300 * 299 // 2))  # dense, and not transitive
    truths = {"fine": fine, "coarse": fine // 8, "mask": mask}
    got = verification_rates(features, truths, far_targets=TARGETS, block=block, normalize=False)
    assert scanning == ["scan"]
    genuine = {"fine": _pairs(fine), "coarse": _pairs(fine // 8), "mask": mask.values != 0}
    for name, one in got.items():
        rates, fars, thresholds = _brute(features, genuine[name], TARGETS)
        np.testing.assert_array_equal(one.rates, rates)
        np.testing.assert_array_equal(one.far, fars)
        np.testing.assert_array_equal(one.thresholds, thresholds)


@pytest.mark.parametrize("fault", ["brackets that miss", "too many pairs inside", "overflow"])
def test_what_the_scan_cannot_settle_goes_the_slower_way(scanning, monkeypatch, fault):
    rng = np.random.default_rng(9)
    features, labels = rng.normal(size=(300, 8)).astype(np.float32), rng.integers(0, 30, 300)
    if fault == "brackets that miss":
        monkeypatch.setattr(scan_search, "SAMPLE", 20)
        monkeypatch.setattr(scan_search, "SIGMAS", 0.0)
        monkeypatch.setattr(scan_search, "EXTRA", 0)
    elif fault == "too many pairs inside":
        monkeypatch.setattr(scan_search, "MOST_KEPT", 100)
    else:
        features *= np.float32(1e19)  # squares exceed float32, not float64
    got = rates_of(features, labels, far_targets=TARGETS, normalize=False, block=100)
    assert scanning == ["radix"]
    rates, fars, _ = _brute(features, _pairs(labels), TARGETS)
    np.testing.assert_array_equal(got.rates, rates)
    np.testing.assert_array_equal(got.far, fars)


def test_the_bound_of_the_sweep_holds_and_is_not_empty():
    rng = np.random.default_rng(10)
    worst = 0.0
    for scale in (1e-3, 1.0, 50.0):
        rows = (rng.lognormal(0, 2, (200, 64)) * scale).astype(np.float32)  # all of one sign
        bound = scan_search.score_error(rows)
        wide = rows.astype(np.float64)
        off = np.abs((rows @ rows.T).astype(np.float64) - wide @ wide.T).max()
        assert off <= bound
        worst = max(worst, off / bound)
    assert worst > 1e-3
    assert scan_search.score_error(np.full((2, 4), 1e20, np.float32)) == np.inf


def test_a_mask_in_a_file_is_read_without_holding_it(tmp_path, scanning):
    rng = np.random.default_rng(11)
    features, labels = rng.normal(size=(120, 6)), rng.integers(0, 9, 120)
    np.save(tmp_path / "mask.npy", _pairs(labels).astype(np.uint8))
    mapped = PairMask(np.load(tmp_path / "mask.npy", mmap_mode="r"))
    by_mask = rates_of(features, mapped, block=32, far_targets=TARGETS)
    by_label = rates_of(features, labels, block=50, far_targets=TARGETS)
    np.testing.assert_array_equal(by_mask.rates, by_label.rates)
    np.testing.assert_array_equal(by_mask.thresholds, by_label.thresholds)
    assert scanning == ["scan", "scan"]
