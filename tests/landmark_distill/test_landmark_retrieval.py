"""Retrieval metrics against sorting by hand, in Python."""

import numpy as np
import pytest

from landmark_distill.judging.retrieval import retrieval


def _brute(features, labels, ks, gallery=None, gallery_labels=None):
    """One query at a time; among equal scores other classes come first."""
    rows = features if gallery is None else gallery
    wanted = labels if gallery is None else gallery_labels
    recalls, aps, at_r = [], [], []
    for q in range(len(features)):
        others = [
            (float(features[q].astype(np.float64) @ rows[g].astype(np.float64)),
             wanted[g] != labels[q])
            for g in range(len(rows))
            if gallery is not None or g != q
        ]  # fmt: skip
        others.sort(key=lambda pair: (-pair[0], not pair[1]))
        hits = [not other for _, other in others]
        total = sum(hits)
        if not total:
            continue
        recalls.append([any(hits[:k]) for k in ks])
        precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(len(hits)) if hits[r]]
        aps.append(sum(precisions) / total)
        at_r.append(
            sum(sum(hits[: r + 1]) / (r + 1) for r in range(min(total, len(hits))) if hits[r])
            / total
        )
    return np.mean(recalls, axis=0), np.mean(aps), np.mean(at_r), len(aps)


@pytest.mark.parametrize("block", [1, 7, 500])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_sorting_by_hand(block, ties):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 90)
    labels[0] = 99  # a query without a match
    features = rng.integers(-2, 3, (90, 4)) if ties else rng.normal(size=(90, 6))
    got = retrieval(features, labels, ks=(1, 3, 20), normalize=False, block=block)
    recall, mean, at_r, queries = _brute(features.astype(np.float32), labels, (1, 3, 20))
    np.testing.assert_allclose(list(got.recall.values()), recall, atol=1e-12)
    assert got.mean_average_precision == pytest.approx(mean, abs=1e-12)
    assert got.mean_average_precision_at_r == pytest.approx(at_r, abs=1e-12)
    assert (got.queries, got.without_match) == (queries, 90 - queries) and queries < 90


def test_with_a_gallery():
    rng = np.random.default_rng(1)
    features, gallery = rng.normal(size=(20, 5)), rng.normal(size=(70, 5))
    labels, codes = rng.integers(0, 9, 20), rng.integers(0, 8, 70)
    got = retrieval(features, labels, gallery=gallery, gallery_labels=codes, normalize=False)
    recall, mean, at_r, queries = _brute(
        features.astype(np.float32), labels, (1, 5, 10), gallery.astype(np.float32), codes
    )
    np.testing.assert_allclose(list(got.recall.values()), recall, atol=1e-12)
    assert got.mean_average_precision == pytest.approx(mean, abs=1e-12)
    assert got.mean_average_precision_at_r == pytest.approx(at_r, abs=1e-12)
    assert got.queries == queries


def test_average_precision_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 6, 60)
    features = rng.normal(size=(60, 8))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = unit @ unit.T
    keep = ~np.eye(60, dtype=bool)
    wanted = [
        sklearn.average_precision_score(labels[keep[q]] == labels[q], scores[q][keep[q]])
        for q in range(60)
    ]
    got = retrieval(features, labels)
    assert got.mean_average_precision == pytest.approx(np.mean(wanted), abs=1e-9)


def test_the_limits():
    labels = np.repeat(np.arange(5), 4)
    perfect = retrieval(np.eye(5)[labels], labels, ks=(1,))
    assert perfect.recall == {1: 1.0}
    assert perfect.mean_average_precision == perfect.mean_average_precision_at_r == 1.0
    collapsed = retrieval(np.ones((20, 3)), labels, ks=(1, 16, 17))
    assert collapsed.recall == {1: 0.0, 16: 0.0, 17: 1.0}  # 16 others come first
    assert collapsed.mean_average_precision_at_r == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"labels": [0, 1, 2]}, "no query has a match"),
        ({"labels": [0, 0]}, "2 labels for 3"),
        ({"ks": (0,)}, "expected numbers from 1"),
        ({"ks": ()}, "expected numbers from 1"),
        ({"block": 0}, "at least 1"),
        ({"features": np.full((3, 2), np.nan)}, "NaN"),
        ({"features": np.ones(3)}, "shape"),
        ({"gallery": np.ones((2, 2))}, "expected both"),
        ({"gallery": np.ones((2, 5)), "gallery_labels": [0, 1]}, "5 features a row, expected 2"),
    ],
)
def test_bad_input_is_refused(words, message):
    words = {"features": np.ones((3, 2)), "labels": [0, 0, 1], **words}
    with pytest.raises(ValueError, match=message):
        retrieval(words.pop("features"), words.pop("labels"), **words)
