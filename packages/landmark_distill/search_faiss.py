"""FAISS as an engine for galleries too large to scan: optional, imported when it is asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.features import unit_rows
from landmark_distill.search_exact import Neighbours

KINDS = ("faiss-flat", "faiss-ivf", "faiss-hnsw")
HNSW_LINKS = 32
TRAIN_PER_LIST = 64  # rows that an inverted file learns a list's centre from


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
        if kind not in KINDS:
            raise ValueError(f"index is {kind!r}, expected one of {', '.join(KINDS)}")
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
        self.count, self.engine = count, kind

    def __len__(self) -> int:
        return self.count

    def search(self, queries: NDArray[Any], k: int = 10) -> Neighbours:
        """The nearest rows found; an index of -1 and a score of -inf where there are fewer."""
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        rows = unit_rows(np.asarray(queries)).astype(np.float32)
        if rows.shape[1] != self._index.d:
            raise ValueError(
                f"queries have {rows.shape[1]} features, the gallery {self._index.d}; "
                "expected the same"
            )
        scores, indices = self._index.search(rows, min(k, self.count))
        scores = np.where(indices < 0, -np.inf, scores.astype(np.float64))
        return Neighbours(scores, indices.astype(np.int64))
