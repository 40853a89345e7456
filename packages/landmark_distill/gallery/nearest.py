"""Nearest neighbours: exact, by a float32 scan that float64 settles; or by FAISS.

The scan's score ``a`` of a pair is near the true one ``s``: ``|a - s| <= e`` with an ``e`` that is
proven, not guessed. When K is the k-th largest ``a`` of a query, all of its k nearest have
``a >= K - 2 e``. Only pairs that reach this are scored again, each alone in float64, and these
scores rank; equal scores are ranked by row.

Source of the bound: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from landmark_distill.config import INDEXES
from landmark_distill.gallery.features import unit_rows

PART = 8192  # rows brought to float32 at a time
QUERIES = 512  # queries scanned at a time, at most
CELLS = 1 << 24  # scores held at a time, where one query has no more
RESCORE = 256  # pairs scored again at a time
HNSW_LINKS = 32
TRAIN_PER_LIST = 64  # rows that an inverted file learns a list's centre from


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of each query, the nearest first; shapes (Q, k)."""

    scores: NDArray[np.float64]
    indices: NDArray[np.int64]


class ExactIndex:
    """A gallery that can be searched; the answers are those of float64.

    Args:
        gallery: (G, D), finite.
        normalize: search by cosine; else by inner product.

    Raises:
        ValueError: another shape, or not finite.
    """

    kind = "exact"

    def __init__(self, gallery: NDArray[Any], *, normalize: bool = True) -> None:
        self.normalize = normalize
        self.rows = _float32("gallery", gallery, normalize)
        self._longest = max(float(_lengths(part).max()) for part in _parts(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: NDArray[Any], k: int = 10) -> Neighbours:
        """The ``k`` nearest rows of each query; fewer when the gallery holds fewer.

        Raises:
            ValueError: queries of another width, or ``k`` below 1.
        """
        rows = _float32("queries", queries, self.normalize)
        _check_search(rows, self.rows.shape[1], k)
        k = min(k, len(self.rows))
        step = min(QUERIES, max(1, CELLS // len(self.rows)))
        found = [self._some(rows[i : i + step], k) for i in range(0, len(rows), step)]
        return Neighbours(
            np.concatenate([one.scores for one in found]),
            np.concatenate([one.indices for one in found]),
        )

    def _some(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        scores = queries @ self.rows.T  # (Q, G)
        best = torch.topk(torch.from_numpy(scores), k, sorted=False).values  # NumPy's takes long
        kth = best.amin(dim=1).double().numpy()
        limits = kth - 2 * self._error(queries)
        # In float32, and never above what they were.
        reach = np.nextafter(limits.astype(np.float32), np.float32(-np.inf))
        query, row = np.divmod(np.flatnonzero(scores >= reach[:, None]), len(self.rows))
        exact = _rescored(queries, self.rows, query, row)
        order = np.lexsort((row, -exact, query))
        begins = np.searchsorted(query, np.arange(len(queries)))  # every query has k or more
        best = order[begins[:, None] + np.arange(k)]  # (Q, k)
        return Neighbours(exact[best], row[best])

    def _error(self, queries: NDArray[np.float32]) -> NDArray[np.float64]:
        """How far a float32 product may be from the truth, for each query."""
        terms = (self.rows.shape[1] + 2) * 2.0**-24  # with room for the bound's own rounding
        return 1.1 * terms / (1 - terms) * _lengths(queries) * self._longest


class FaissIndex:
    """A gallery in FAISS; cosine by unit-length rows. ivf and hnsw may miss neighbours.

    Args:
        gallery: (G, D), finite.
        kind: ``faiss-flat`` (all rows), ``faiss-ivf`` (inverted file) or ``faiss-hnsw`` (graph).
        probes: lists that ivf looks into, or nodes that hnsw keeps in view; more finds more.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: an unknown kind, a bad gallery.
    """

    def __init__(self, gallery: NDArray[Any], *, kind: str = "faiss-ivf", probes: int = 16) -> None:
        if kind not in INDEXES[1:]:
            raise ValueError(f"index is {kind!r}, expected one of {', '.join(INDEXES[1:])}")
        try:
            import faiss
        except ImportError:
            raise ImportError(
                f"faiss is not installed: expected it for {kind}; "
                "pip install './packages/landmark_distill[faiss]', or take --index exact"
            ) from None
        rows = unit_rows(np.asarray(gallery)).astype(np.float32)
        count, width = rows.shape
        if kind == "faiss-flat":
            self._index = faiss.IndexFlatIP(width)
        elif kind == "faiss-hnsw":
            self._index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efSearch = max(probes, 1)
        else:
            lists = max(1, min(round(4 * math.sqrt(count)), count // 39 or 1))
            coarse = faiss.IndexFlatIP(width)
            self._index = faiss.IndexIVFFlat(coarse, width, lists, faiss.METRIC_INNER_PRODUCT)
            step = max(1, count // (TRAIN_PER_LIST * lists))
            self._index.train(np.ascontiguousarray(rows[::step]))
            self._index.nprobe = min(probes, lists)
        self._index.add(rows)
        self.count, self.kind = count, kind

    def __len__(self) -> int:
        return self.count

    def search(self, queries: NDArray[Any], k: int = 10) -> Neighbours:
        """The nearest rows found; an index of -1 and a score of -inf where there are fewer."""
        rows = unit_rows(np.asarray(queries)).astype(np.float32)
        _check_search(rows, self._index.d, k)
        scores, indices = self._index.search(rows, min(k, self.count))
        scores = np.where(indices < 0, -np.inf, scores.astype(np.float64))
        return Neighbours(scores, indices.astype(np.int64))


def _check_search(queries: NDArray[np.float32], width: int, k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if queries.shape[1] != width:
        raise ValueError(
            f"queries have {queries.shape[1]} features, the gallery {width}; expected the same"
        )


def _rescored(
    queries: NDArray[np.float32],
    rows: NDArray[np.float32],
    query: NDArray[np.int64],
    row: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Scores of single pairs in float64; equal rows give equal bits wherever they lie."""
    exact = np.empty(len(query))
    for start in range(0, len(query), RESCORE):
        part = slice(start, start + RESCORE)
        product = np.multiply(queries[query[part]], rows[row[part]], dtype=np.float64)
        product.sum(axis=1, out=exact[part])
    return exact


def _parts(rows: NDArray[Any]) -> list[NDArray[Any]]:
    return [rows[start : start + PART] for start in range(0, len(rows), PART)]


def _lengths(rows: NDArray[Any]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    return lengths


def _float32(name: str, given: NDArray[Any], normalize: bool) -> NDArray[np.float32]:
    array = np.asarray(given)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, expected numbers (N, D)")
    rows = np.empty(array.shape, np.float32)
    for part, target in zip(_parts(array), _parts(rows), strict=True):
        if not np.isfinite(part).all():
            raise ValueError(f"{name} hold NaN or infinity, expected finite numbers")
        target[:] = unit_rows(part) if normalize else part
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} hold numbers that float32 cannot, expected smaller ones")
    return rows
