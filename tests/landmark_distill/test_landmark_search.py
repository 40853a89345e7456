"""Exact search: the answers of float64 brute force, whatever scans; FAISS; the bound."""

import numpy as np
import pytest

from landmark_distill.gallery import nearest
from landmark_distill.gallery.nearest import ExactIndex, FaissIndex


def _kept(rows):
    """As the index keeps them: unit length in float64, then float32."""
    wide = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _brute(gallery, queries, k):
    """float64 products, one pair after the other; equal scores by row."""
    wide = np.asarray(gallery, np.float64)
    scores, indices = [], []
    for query in np.asarray(queries, np.float64):
        mine = (wide * query).sum(axis=1)
        order = sorted(range(len(mine)), key=lambda i: (-mine[i], i))[:k]
        indices.append(order)
        scores.append(mine[order])
    return np.array(scores), np.array(indices)


def _check(index, gallery, queries, k):
    got = index.search(queries, k)
    scores, indices = _brute(gallery, queries, k)
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("k", "cells"), [(1, 700), (10, 4000), (10, 1 << 24), (999, 20_000)])
def test_equals_brute_force(monkeypatch, k, cells):
    monkeypatch.setattr(nearest, "CELLS", cells)
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(700, 24)), rng.normal(size=(40, 24))
    index = ExactIndex(gallery)
    assert len(index) == 700
    got = index.search(queries, k)
    scores, indices = _brute(_kept(gallery), _kept(queries), min(k, 700))
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-12)


def _near_rows():
    """Hundreds of rows around one point, nearer to each other than float32 products can tell."""
    rng = np.random.default_rng(1)
    centre = rng.normal(size=64)
    gallery = (centre + 1e-6 * rng.normal(size=(900, 64))).astype(np.float32)
    gallery[500] = gallery[3]  # equal rows: the lower one first
    queries = (centre + 1e-3 * rng.normal(size=(9, 64))).astype(np.float32)
    return gallery, queries


def test_neighbours_that_the_scan_cannot_tell_apart():
    gallery, queries = _near_rows()
    _check(ExactIndex(gallery, normalize=False), gallery, queries, 25)


def test_without_the_bound_answers_are_lost(monkeypatch):
    gallery, queries = _near_rows()
    _, indices = _brute(gallery, queries, 25)
    monkeypatch.setattr(ExactIndex, "_error", lambda self, queries: np.zeros(len(queries)))
    found = ExactIndex(gallery, normalize=False).search(queries, 25)
    assert (found.indices != indices).any()


def test_the_bound_holds_and_is_not_empty():
    rng = np.random.default_rng(4)
    rows, queries = (rng.lognormal(0, 2, (n, 64)).astype(np.float32) for n in (300, 40))
    index = ExactIndex(rows, normalize=False)
    bound = index._error(queries)
    wide = queries.astype(np.float64) @ rows.astype(np.float64).T
    off = np.abs((queries @ rows.T).astype(np.float64) - wide).max(axis=1)
    assert (off <= bound).all() and (off > bound / 1000).any()


def test_ties_negative_scores_and_zero_rows():
    rng = np.random.default_rng(2)
    gallery = rng.integers(-2, 3, (300, 3)).astype(np.float32)
    gallery[7] = 0
    _check(ExactIndex(gallery, normalize=False), gallery, gallery[:60], 40)
    away = -np.abs(rng.normal(size=(200, 8))).astype(np.float32)  # all scores below zero
    queries = np.abs(rng.normal(size=(10, 8))).astype(np.float32)
    _check(ExactIndex(away, normalize=False), away, queries, 7)
    scaled = away * np.float32(300)
    _check(ExactIndex(scaled, normalize=False), scaled, -queries, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExactIndex(np.ones(3)), "expected numbers"),
        (lambda: ExactIndex(np.full((2, 2), np.inf)), "NaN or infinity"),
        (lambda: ExactIndex(np.eye(2)).search(np.ones((1, 3))), "have 3 features"),
        (lambda: ExactIndex(np.eye(2)).search(np.eye(2), 0), "k is 0"),
        (lambda: ExactIndex(np.full((2, 2), 1e300), normalize=False), "float32 cannot"),
    ],
)
def test_bad_input_is_refused(call, message):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        call()


def test_faiss_flat_agrees_and_the_others_find_most():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(5)
    gallery = rng.normal(size=(50, 16))[rng.integers(0, 50, 2000)] + rng.normal(size=(2000, 16)) / 3
    queries = gallery[:50] + rng.normal(size=(50, 16)) / 10
    truth = ExactIndex(gallery).search(queries, 5)
    flat = FaissIndex(gallery, kind="faiss-flat").search(queries, 5)
    np.testing.assert_array_equal(flat.indices, truth.indices)
    np.testing.assert_allclose(flat.scores, truth.scores, atol=1e-5)
    for kind in ("faiss-ivf", "faiss-hnsw"):
        found = FaissIndex(gallery, kind=kind, probes=16).search(queries, 5)
        pairs = zip(found.indices.tolist(), truth.indices.tolist(), strict=True)
        share = np.mean([len(set(mine) & set(right)) / 5 for mine, right in pairs])
        assert share > 0.8, kind
    with pytest.raises(ValueError, match="index is 'faiss-pq'"):
        FaissIndex(gallery, kind="faiss-pq")
    with pytest.raises(ValueError, match="expected the same"):
        FaissIndex(gallery).search(np.ones((1, 3)), 1)
