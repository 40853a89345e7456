"""Calibration against scikit-learn, scipy and loops that follow the definitions."""

import numpy as np
import pytest
from scipy import optimize, special
from sklearn import metrics as sk

from shared_core import metrics


def _probs(seed=0, n=500, classes=5, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * scale
    labels = np.array([rng.choice(classes, p=p) for p in special.softmax(logits * 0.4, axis=1)])
    return logits, special.softmax(logits, axis=1), labels


def _ece_loop(confidence, correct, bins, scheme):
    """The definition, sample by sample and in exact order."""
    groups = [[] for _ in range(bins)]
    ranked = sorted(confidence)
    for c, right in zip(confidence, correct, strict=True):
        if scheme == "width":
            place = next(b for b in range(bins) if c <= (b + 1) / bins)
        else:
            place = ranked.index(c) * bins // len(ranked)
        groups[place].append((c, right))
    error = 0.0
    for group in filter(None, groups):
        mean_c = sum(c for c, _ in group) / len(group)
        mean_r = sum(r for _, r in group) / len(group)
        error += len(group) / len(confidence) * abs(mean_c - mean_r)
    return error


@pytest.mark.parametrize("scheme", ["width", "mass"])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_ece_follows_its_definition(bins, scheme):
    _, probs, labels = _probs()
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    expected = _ece_loop(confidence.tolist(), correct.tolist(), bins, scheme)
    assert metrics.ece(probs, labels, bins=bins, scheme=scheme) == pytest.approx(expected)
    assert metrics.ece(confidence, correct, bins=bins, scheme=scheme) == pytest.approx(expected)


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_ece_with_ties_follows_its_definition_and_ignores_the_order(scheme):
    rng = np.random.default_rng(1)
    confidence = rng.choice([0.0, 0.2, 0.25, 0.6, 0.6, 0.9, 1.0], 203)
    correct = rng.integers(0, 2, 203)
    expected = _ece_loop(confidence.tolist(), correct.tolist(), 5, scheme)
    for _ in range(5):
        order = rng.permutation(203)
        got = metrics.ece(confidence[order], correct[order], bins=5, scheme=scheme)
        assert got == pytest.approx(expected, abs=1e-12)


def test_bins_are_open_below_and_closed_above():
    curve = metrics.reliability_curve(np.array([0.0, 0.5, 0.50001, 1.0]), [0, 1, 0, 1], bins=2)
    np.testing.assert_array_equal(curve.count, [2, 2])
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.5])
    np.testing.assert_allclose(curve.confidence, [0.25, 0.750005])


@pytest.mark.parametrize("bins", [3, 7, 10, 15, 20])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(bins):
    for b in range(1, bins + 1):
        curve = metrics.reliability_curve(np.array([b / bins]), [1], bins=bins)
        assert curve.count.argmax() == b - 1


def test_mass_bins_hold_equal_shares_without_ties():
    confidence = np.random.default_rng(2).permutation(np.linspace(0.3, 0.9, 103))
    curve = metrics.reliability_curve(confidence, np.ones(103, int), bins=10, scheme="mass")
    assert set(curve.count.tolist()) == {10, 11} and curve.count.sum() == 103


def test_limit_cases_of_ece():
    ones = np.eye(3)[[0, 1, 2, 0]]
    assert metrics.ece(ones, [0, 1, 2, 0]) == 0  # always right and sure
    assert metrics.ece(ones, [1, 2, 0, 1]) == 1  # always wrong and sure
    half = np.full(10, 0.5)
    for scheme in ("width", "mass"):
        assert metrics.ece(half, [1, 0] * 5, scheme=scheme) == 0
        assert metrics.ece(half, [1] * 10, scheme=scheme) == 0.5


def test_empty_bins_of_the_curve_are_nan():
    curve = metrics.reliability_curve(np.array([0.9, 0.95]), [1, 0], bins=4)
    assert np.isnan(curve.accuracy[:3]).all() and curve.accuracy[3] == 0.5


def test_curve_equals_scikit_learns_for_a_binary_forecast():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(3)
    p = rng.uniform(size=1000)
    y = (rng.uniform(size=1000) < p).astype(int)
    curve = metrics.reliability_curve(p, y, bins=10)
    accuracy, confidence = calibration_curve(y, p, n_bins=10)
    np.testing.assert_allclose(curve.accuracy, accuracy)
    np.testing.assert_allclose(curve.confidence, confidence)


def test_nll_and_brier_equal_scikit_learn():
    logits, probs, labels = _probs(4)
    assert metrics.nll(probs, labels) == pytest.approx(sk.log_loss(labels, probs), rel=1e-12)
    assert metrics.nll_from_logits(logits, labels) == pytest.approx(metrics.nll(probs, labels))
    onehot = np.eye(5)[labels]
    expected = sum(sk.brier_score_loss(onehot[:, c], probs[:, c]) for c in range(5))
    assert metrics.brier(probs, labels) == pytest.approx(expected, rel=1e-12)
    binary = probs[:, 0]
    expected = sk.brier_score_loss(onehot[:, 0], binary)
    assert metrics.brier_binary(binary, onehot[:, 0].astype(int)) == pytest.approx(expected)


def test_the_multiclass_brier_of_two_classes_is_twice_the_binary_one():
    p = np.random.default_rng(5).uniform(size=50)
    y = np.arange(50) % 2
    both = metrics.brier(np.column_stack([1 - p, p]), y)
    assert both == pytest.approx(2 * metrics.brier_binary(p, y))


def test_nll_of_an_impossible_label_is_infinite_and_logits_do_not_underflow():
    assert metrics.nll(np.array([[1.0, 0.0]]), [1]) == np.inf
    assert metrics.nll_from_logits([[1e4, -1e4]], [1]) == pytest.approx(2e4)
    np.testing.assert_allclose(metrics.softmax([[1e4, 1e4]]), [[0.5, 0.5]])


def test_softmax_equals_scipy():
    logits, _, _ = _probs(6)
    np.testing.assert_allclose(
        metrics.softmax(logits, temperature=2.5), special.softmax(logits / 2.5, axis=1)
    )
    np.testing.assert_allclose(metrics.log_softmax(logits), special.log_softmax(logits, axis=1))


@pytest.mark.parametrize("batch", [1, 64, 500])
def test_streaming_calibration_equals_the_whole(batch):
    _, probs, labels = _probs(7)
    left, right = metrics.Calibration(bins=12), metrics.Calibration(bins=12)
    for start in range(0, 500, batch):
        meter = left if start < 250 else right
        meter.update(probs[start : start + batch], labels[start : start + batch])
    left.update(np.zeros((0, 5)), np.zeros(0, int))
    left.merge(right)
    assert left.result() == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, probs.argmax(1)),
            "confidence": probs.max(1).mean(),
            "ece": metrics.ece(probs, labels, bins=12),
            "nll": sk.log_loss(labels, probs),
            "brier": metrics.brier(probs, labels),
        },
        rel=1e-10,
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 40.0])
def test_temperature_is_scipys_optimum(scale):
    logits, _, labels = _probs(8)
    logits = logits * scale + np.arange(5)  # an offset per class: not only a rescaling
    got = metrics.fit_temperature(logits, labels, bounds=(1e-3, 1e3))

    def loss(log_t):
        return -special.log_softmax(logits / np.exp(log_t), axis=1)[range(500), labels].mean()

    # The loss is flat at its minimum: scipy knows T to about the root of the precision.
    best = optimize.minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    assert np.log(got) == pytest.approx(best.x, abs=1e-5)
    assert loss(np.log(got)) <= best.fun + 1e-14
    assert metrics.nll_from_logits(logits, labels, temperature=got) == pytest.approx(best.fun)


def test_temperature_undoes_a_scaling_exactly():
    logits, _, labels = _probs(9)
    base = metrics.fit_temperature(logits, labels)
    assert metrics.fit_temperature(logits * 7, labels) == pytest.approx(7 * base, rel=1e-12)


def test_temperature_stops_at_its_bounds():
    logits = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert metrics.fit_temperature(logits, [0, 1]) == 0.01
    assert metrics.fit_temperature(logits, [1, 0], bounds=(0.5, 20)) == 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.ece(np.array([0.5, 0.5]), [1]), "shape"),
        (lambda: metrics.ece(np.array([1.5]), [1]), r"\[0, 1\]"),
        (lambda: metrics.ece(np.array([0.5]), [2]), "below 2"),
        (lambda: metrics.ece(np.array([]), []), "integers|0 samples"),
        (lambda: metrics.ece(np.zeros((0, 3)), np.zeros(0, int)), "0 samples"),
        (lambda: metrics.ece(np.array([0.5]), [1], bins=0), "bins"),
        (lambda: metrics.ece(np.array([0.5]), [1], scheme="quantile"), "scheme"),
        (lambda: metrics.nll(np.array([[0.4, 0.4]]), [0]), "sum of 1"),
        (lambda: metrics.nll(np.array([[1.5, -0.5]]), [0]), r"\[0, 1\]"),
        (lambda: metrics.nll(np.array([[0.5, 0.5]]), [2]), "below 2"),
        (lambda: metrics.nll_from_logits([[np.inf, 0.0]], [0]), "infinity"),
        (lambda: metrics.nll_from_logits([[1.0, 0.0]], [0, 1]), "rows"),
        (lambda: metrics.softmax([[1.0, 0.0]], temperature=0), "temperature"),
        (lambda: metrics.brier_binary([0.5], [0, 1]), "shape"),
        (lambda: metrics.brier_binary([1.5], [1]), r"\[0, 1\]"),
        (lambda: metrics.fit_temperature([[1.0, 0.0]], [0], bounds=(2, 1)), "bounds"),
        (lambda: metrics.fit_temperature([[1.0, 0.0]], [0, 1]), "rows"),
        (lambda: metrics.Calibration(bins=0), "bins"),
        (lambda: metrics.Calibration().result(), "0 samples"),
        (lambda: metrics.Calibration(bins=3).merge(metrics.Calibration(bins=4)), "merge"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
