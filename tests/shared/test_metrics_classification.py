"""Accuracy, confusion and report against scikit-learn and by hand."""

import re
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from shared_core import metrics


def _data(seed, n=400, classes=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, classes)), rng.integers(0, classes, n)


@pytest.mark.parametrize("batch", [1, 7, 400])
def test_top_k_equals_scikit_learn_for_any_batching(batch):
    scores, labels = _data(0)
    meter = metrics.TopK((1, 2, 5))
    for start in range(0, len(labels), batch):
        meter.update(scores[start : start + batch], labels[start : start + batch])
    expected = {k: sk.top_k_accuracy_score(labels, scores, k=k, labels=range(7)) for k in (1, 2, 5)}
    assert meter.result() == pytest.approx(expected, abs=1e-12)


def test_top_k_of_equal_scores_prefers_the_lower_class_like_argmax():
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    meter = metrics.TopK((1, 2))
    meter.update(scores, [0, 1, 2])
    assert meter.result() == {1: 1 / 3, 2: 2 / 3}


def test_top_k_merges_processes():
    scores, labels = _data(1)
    whole, left, right = metrics.TopK((1,)), metrics.TopK((1,)), metrics.TopK((1,))
    whole.update(scores, labels)
    left.update(scores[:33], labels[:33])
    right.update(scores[33:], labels[33:])
    left.merge(right)
    assert left.result() == whole.result()
    with pytest.raises(ValueError, match="cannot merge"):
        left.merge(metrics.TopK((2,)))


@pytest.mark.parametrize("as_scores", [True, False])
def test_confusion_equals_scikit_learn(as_scores):
    scores, labels = _data(2)
    confusion = metrics.Confusion(7)
    for part in np.array_split(np.arange(len(labels)), 9):
        confusion.update(scores[part] if as_scores else scores[part].argmax(1), labels[part])
    expected = sk.confusion_matrix(labels, scores.argmax(1), labels=range(7))
    np.testing.assert_array_equal(confusion.result(), expected)
    assert metrics.accuracy(confusion.result()) == sk.accuracy_score(labels, scores.argmax(1))


def test_confusion_rows_are_true_classes_and_the_result_is_a_copy():
    confusion = metrics.Confusion(3)
    confusion.update([2, 2], [0, 1])
    confusion.result()[0, 2] = 99
    np.testing.assert_array_equal(confusion.result(), [[0, 0, 1], [0, 0, 1], [0, 0, 0]])
    other = metrics.Confusion(3)
    other.update([0], [0])
    confusion.merge(other)
    assert np.trace(confusion.result()) == 1


# Class 1 is never predicted, class 2 never occurs, class 3 neither.
HOLES = (np.array([0, 0, 1, 1, 0]), np.array([0, 2, 0, 2, 0]))


@pytest.mark.parametrize("zero_division", [0.0, 1.0, np.nan])
@pytest.mark.parametrize("case", ["full", "holes"])
def test_per_class_equals_scikit_learn_also_where_it_divides_by_zero(case, zero_division):
    if case == "full":
        scores, labels = _data(3)
        predicted, classes = scores.argmax(1), 7
    else:
        (labels, predicted), classes = HOLES, 4
    confusion = metrics.Confusion(classes)
    confusion.update(predicted, labels)
    got = metrics.per_class(confusion.result(), zero_division=zero_division)
    expected = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=zero_division
    )
    for ours, theirs in zip(
        (got.precision, got.recall, got.f1, got.support), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("zero_division", [0.0, 1.0, np.nan])
@pytest.mark.parametrize("digits", [2, 4])
@pytest.mark.parametrize("case", ["full", "holes", "nothing right"])
def test_the_report_is_scikit_learns(case, digits, zero_division):
    if case == "full":
        scores, labels = _data(4, n=3000)
        predicted = scores.argmax(1)
        names = ["a", "bb", "a very long class name", "d", "e", "f", "g"]
    elif case == "holes":
        (labels, predicted), names = HOLES, ["w", "x", "y", "z"]
    else:
        labels, predicted, names = np.array([0, 0]), np.array([1, 1]), ["w", "x", "y"]
    confusion = metrics.Confusion(len(names))
    confusion.update(predicted, labels)
    wanted = {
        "labels": range(len(names)),
        "target_names": names,
        "zero_division": zero_division,
    }
    text = metrics.classification_report(
        confusion.result(), names, digits=digits, zero_division=zero_division
    )
    theirs = sk.classification_report(labels, predicted, digits=digits, **wanted)
    if case == "nothing right":  # scikit-learn then prints its supports as 2.0
        text = [line.split() for line in text.splitlines()]
        theirs = [re.sub(r"\.0$", "", line).split() for line in theirs.splitlines()]
    assert text == theirs
    report = metrics.classification_report(
        confusion.result(), names, output_dict=True, zero_division=zero_division
    )
    expected = sk.classification_report(labels, predicted, output_dict=True, **wanted)
    assert report.keys() == expected.keys()
    for name, row in expected.items():
        assert report[name] == pytest.approx(row, rel=1e-12, nan_ok=True), name


def test_no_warning_is_raised_for_empty_classes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.per_class(np.array([[1, 0], [0, 0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.TopK(()), "ks"),
        (lambda: metrics.TopK((0,)), "ks"),
        (lambda: metrics.TopK((4,)).update(np.zeros((1, 3)), [0]), "k is 4"),
        (lambda: metrics.TopK((1,)).update(np.zeros((1, 3)), [3]), "below 3"),
        (lambda: metrics.TopK((1,)).update(np.zeros((2, 3)), [0]), "2 rows"),
        (lambda: metrics.TopK((1,)).update(np.full((1, 3), np.nan), [0]), "NaN"),
        (lambda: metrics.TopK((1,)).result(), "0 samples"),
        (lambda: metrics.Confusion(0), "num_classes"),
        (lambda: metrics.Confusion(2).update([2], [0]), "below 2"),
        (lambda: metrics.Confusion(2).update([0], [-1]), "at least 0"),
        (lambda: metrics.Confusion(2).update([0, 1], [1]), "2 predictions"),
        (lambda: metrics.Confusion(2).update([0.5], [1]), "integers"),
        (lambda: metrics.Confusion(2).update(np.zeros((1, 3)), [1]), "3 columns"),
        (lambda: metrics.Confusion(2).merge(metrics.Confusion(3)), "cannot merge"),
        (lambda: metrics.accuracy(np.zeros((2, 2), int)), "0 samples"),
        (lambda: metrics.per_class(np.zeros((2, 3), int)), "shape"),
        (lambda: metrics.per_class(np.full((2, 2), 0.5)), "counts"),
        (lambda: metrics.per_class(np.eye(2, dtype=int), zero_division=0.5), "zero_division"),
        (lambda: metrics.classification_report(np.eye(2, dtype=int), ["a"]), "class names"),
        (lambda: metrics.TopK((1,)).update(np.zeros(3), [0]), "shape"),
        (lambda: metrics.Confusion(2).update([0], [[0]]), "shape"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
