"""Exact search: the answers of float64 brute force, whatever scans; FAISS; the bound."""

import numpy as np
import pytest
import torch

from landmark_distill import search_exact
from landmark_distill.search_exact import ExactIndex
from landmark_distill.search_faiss import FaissIndex


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


@pytest.mark.parametrize("engine", ["fp32", "bf16"])
@pytest.mark.parametrize(("k", "chunk"), [(1, 64), (10, 64), (10, 10_000), (300, 128), (999, 64)])
def test_equals_brute_force(monkeypatch, engine, k, chunk):
    monkeypatch.setattr(search_exact, "CHUNK", chunk)
    monkeypatch.setattr(search_exact, "QUERIES", 16)
    rng = np.random.default_rng(0)
    gallery, queries = _kept(rng.normal(size=(700, 24))), _kept(rng.normal(size=(40, 24)))
    index = ExactIndex(gallery, engine=engine)
    assert index.engine == engine and len(index) == 700
    got = index.search(queries, k)
    scores, indices = _brute(_kept(gallery), _kept(queries), min(k, 700))
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-12)


@pytest.mark.parametrize("engine", ["fp32", "bf16"])
def test_neighbours_that_the_scan_cannot_tell_apart(monkeypatch, engine):
    """Hundreds of rows around one point, nearer to each other than bfloat16 or float32 see."""
    monkeypatch.setattr(search_exact, "CHUNK", 100)
    monkeypatch.setattr(search_exact, "PENDING", 500)  # settle in between, too
    rng = np.random.default_rng(1)
    centre = rng.normal(size=64)
    gallery = (centre + 1e-6 * rng.normal(size=(900, 64))).astype(np.float32)
    gallery[500] = gallery[3]  # equal rows: the lower one first
    queries = (centre + 1e-3 * rng.normal(size=(9, 64))).astype(np.float32)
    _check(ExactIndex(gallery, normalize=False, engine=engine), gallery, queries, 25)


@pytest.mark.parametrize("engine", ["fp32", "bf16"])
def test_ties_negative_scores_and_zero_rows(monkeypatch, engine):
    monkeypatch.setattr(search_exact, "CHUNK", 50)
    rng = np.random.default_rng(2)
    gallery = rng.integers(-2, 3, (300, 3)).astype(np.float32)
    gallery[7] = 0
    _check(ExactIndex(gallery, normalize=False, engine=engine), gallery, gallery[:60], 40)
    away = -np.abs(rng.normal(size=(200, 8))).astype(np.float32)  # all scores below zero
    queries = np.abs(rng.normal(size=(10, 8))).astype(np.float32)
    _check(ExactIndex(away, normalize=False, engine=engine), away, queries, 7)
    scaled = away * np.float32(300)
    _check(ExactIndex(scaled, normalize=False, engine=engine), scaled, -queries, 7)


def test_the_same_answers_bit_by_bit_from_both_engines():
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(size=(5000, 96)), rng.normal(size=(30, 96))
    a, b = (ExactIndex(gallery, engine=e).search(queries, 10) for e in ("fp32", "bf16"))
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.scores, b.scores)


def test_the_bound_of_bfloat16_holds_and_without_it_answers_are_lost(monkeypatch):
    rng = np.random.default_rng(4)
    gallery, queries = _kept(rng.normal(size=(3000, 32))), _kept(rng.normal(size=(60, 32)))
    held = search_exact._Bf16Rows(gallery)
    kept = torch.from_numpy(queries).bfloat16()
    gap = np.linalg.norm(queries.astype(np.float64) - kept.float().numpy(), axis=1)
    bound = gap + (1 + gap) * (held.gap + 1e-5 * held.longest)
    off = np.abs(
        kept.double().numpy() @ held.rows.double().numpy().T
        - queries.astype(np.float64) @ gallery.astype(np.float64).T
    ).max(axis=1)
    assert (off <= bound).all() and (off > bound / 20).any()
    _, indices = _brute(gallery, queries, 60)
    index = ExactIndex(gallery, normalize=False, engine="bf16")
    np.testing.assert_array_equal(index.search(queries, 60).indices, indices)
    best = search_exact._Candidates.limits

    def careless(self, error, *, rounded):
        return best(self, error * 0, rounded=False)

    monkeypatch.setattr(search_exact._Candidates, "limits", careless)
    assert (index.search(queries, 60).indices != indices).any()


@pytest.mark.parametrize(
    "limits", [[0.25, 0.5], [1e-3, 0.7], [-0.25, 0.5], [0.1, 1.0], [-np.inf, 0.3], [0.3001, 0.2999]]
)
def test_bits_of_bfloat16_compare_as_numbers_do(limits):
    scores = torch.linspace(-1, 1, 4001).bfloat16().repeat(2, 1)
    limits = np.array(limits)
    got = search_exact._reach(scores, limits)
    surely = scores.double().numpy() >= limits[:, None]
    assert (got | ~surely).all()  # nothing is lost
    nearly = scores.double().numpy() >= limits[:, None] - np.abs(limits[:, None]) / 64 - 1e-6
    assert (nearly | ~got).all()  # and little is taken besides


def test_the_faster_engine_is_chosen_by_trial():
    assert search_exact._faster(64) in ("fp32", "bf16")
    assert ExactIndex(np.eye(4)).engine in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExactIndex(np.ones(3)), "expected numbers"),
        (lambda: ExactIndex(np.full((2, 2), np.inf)), "NaN or infinity"),
        (lambda: ExactIndex(np.ones((2, 2)), engine="int8"), "engine is 'int8'"),
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
