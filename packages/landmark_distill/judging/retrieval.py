"""Retrieval metrics over all queries, block by block: recall@k, mAP and mAP@R."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.metrics.arrays import as_labels


@dataclass(frozen=True)
class Retrieval:
    """Means over the queries that have a match; fractions in [0, 1]."""

    recall: dict[int, float]  # by k: queries with a match among the k nearest
    mean_average_precision: float
    mean_average_precision_at_r: float
    queries: int  # that have a match
    without_match: int  # that have none and count for nothing

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **{f"recall_at_{k}": value for k, value in self.recall.items()},
            "map": self.mean_average_precision,
            "map_at_r": self.mean_average_precision_at_r,
            "queries": self.queries,
            "without_match": self.without_match,
        }


def retrieval(
    features: NDArray[Any],
    labels: NDArray[Any] | Sequence[int],
    *,
    gallery: NDArray[Any] | None = None,
    gallery_labels: NDArray[Any] | Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    normalize: bool = True,
    block: int = 512,
) -> Retrieval:
    """Every feature asks for its class: among all others, or in a gallery.

    Among equal scores those of other classes come first, so that a network that maps everything
    to one point earns nothing. A query's average precision is the mean over its R matches of
    (matches up to there) / (rank); mAP@R counts only the matches within the first R ranks.

    Args:
        features: (N, D), finite.
        labels: class of each, whole numbers from 0.
        gallery: (G, D), where to search; None searches the other features.
        gallery_labels: with ``gallery``.
        ks: of recall@k.
        normalize: score by cosine; else by inner product.
        block: queries at a time; memory is ``block * G`` scores.

    Raises:
        ValueError: shapes that do not fit, not finite, or no query with a match.

    Source: Musgrave et al. 2020, arXiv:2003.08505, section 3.2 (mAP@R).
    """
    queries, codes = _checked("features", features, labels, normalize)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks are {tuple(ks)}, expected numbers from 1")
    if block < 1:
        raise ValueError(f"block is {block}, expected at least 1")
    alone = gallery is None
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: got one of them, expected both")
    if gallery is None or gallery_labels is None:
        rows, wanted = queries, codes
    else:
        rows, wanted = _checked("gallery", gallery, gallery_labels, normalize)
    if rows.shape[1] != queries.shape[1]:
        raise ValueError(f"gallery has {rows.shape[1]} features a row, expected {queries.shape[1]}")
    order = np.argsort(wanted, kind="stable")
    starts = np.searchsorted(wanted[order], codes, side="left")
    stops = np.searchsorted(wanted[order], codes, side="right")
    found: list[NDArray[np.int64]] = []  # of each query that has a match
    for first in range(0, len(queries), block):
        scores = queries[first : first + block] @ rows.T
        if alone:  # a query does not find itself
            places = np.arange(len(scores))
            scores[places, places + first] = -np.inf
        sorted_scores = np.sort(scores, axis=1)
        for row in range(len(scores)):
            query = first + row
            matches = order[starts[query] : stops[query]]
            if alone:
                matches = matches[matches != query]
            if len(matches):
                found.append(_ranks(scores[row, matches], sorted_scores[row]))
    return _means(found, ks, len(queries))


def _ranks(matches: NDArray[np.float32], everything: NDArray[np.float32]) -> NDArray[np.int64]:
    """Ranks of the matches from 1, the best first; ``everything`` is sorted, matches included."""
    mine = np.sort(matches)
    reach = len(everything) - np.searchsorted(everything, mine, side="left")
    others = reach - (len(mine) - np.searchsorted(mine, mine, side="left"))
    ranks: NDArray[np.int64] = others[::-1] + np.arange(1, len(mine) + 1)
    return ranks


def _means(found: Sequence[NDArray[np.int64]], ks: Sequence[int], queries: int) -> Retrieval:
    if not found:
        raise ValueError("no query has a match: expected two images of a class")
    precision = at_r = 0.0
    for ranks in found:
        shares = np.arange(1, len(ranks) + 1) / ranks  # matches up to each, by its rank
        precision += float(shares.mean())
        at_r += float(shares[ranks <= len(ranks)].sum()) / len(ranks)
    first = np.array([ranks[0] for ranks in found])
    return Retrieval(
        recall={k: float((first <= k).mean()) for k in ks},
        mean_average_precision=precision / len(found),
        mean_average_precision_at_r=at_r / len(found),
        queries=len(found),
        without_match=queries - len(found),
    )


def _checked(
    name: str, features: NDArray[Any], labels: NDArray[Any] | Sequence[int], normalize: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    given = np.asarray(features)
    if given.ndim != 2 or not given.size:
        raise ValueError(f"{name} have shape {given.shape}, expected (N, D)")
    codes = as_labels(labels)
    if len(codes) != len(given):
        raise ValueError(f"{name}: got {len(codes)} labels for {len(given)} features")
    rows = np.array(given, dtype=np.float32, order="C")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} hold NaN or infinity, expected finite numbers")
    if normalize:
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
        rows /= np.where(lengths == 0, 1, lengths)
    return rows, codes
