"""Exact nearest neighbours of landmark_distill against FAISS's flat index and a plain product.

60,000 gallery rows of 1,024 features; cosine. One thread and its CPU time, by turns; building an
index is not counted on either side. Answers are compared row by row: where they differ, the two
scores are nearer than float32 can tell.

    python tools/bench/search.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / n) for n in ("packages", "shared", "tools/bench")]
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from _rows import measure, row, skipped
from numpy.typing import NDArray

from landmark_distill.gallery.nearest import ExactIndex
from shared_core.runs import write_benchmark

WIDTH = 1024
Pair = tuple[NDArray[Any], NDArray[Any]]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def data(count: int, queries: int, *, clusters: bool) -> Pair:
    """Random rows; with clusters ten near a centre, and queries near one, too."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((count, WIDTH), dtype=np.float32)
    asked = rng.standard_normal((queries, WIDTH), dtype=np.float32)
    if clusters:
        centres = rng.standard_normal((count // 10, WIDTH), dtype=np.float32)
        gallery = 0.5 * gallery + centres[np.arange(count) % len(centres)]
        asked = 0.5 * asked + centres[np.arange(queries) % len(centres)]
    return unit(gallery), unit(asked)


def faiss_flat(gallery: NDArray[np.float32]) -> Callable[[NDArray[np.float32], int], Pair] | None:
    """FAISS's exact index; None: it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(gallery)
    return lambda queries, k: index.search(queries, k)


def plain(gallery: NDArray[np.float32]) -> Callable[[NDArray[np.float32], int], Pair]:
    """All scores of the queries, then the largest of each row."""

    def search(queries: NDArray[np.float32], k: int) -> Pair:
        scores = queries @ gallery.T
        some = np.argpartition(scores, -k, axis=1)[:, -k:]
        found = np.take_along_axis(scores, some, axis=1)
        order = np.argsort(-found, axis=1)
        return np.take_along_axis(found, order, 1), np.take_along_axis(some, order, 1)

    return search


def differing(mine: NDArray[np.int64], other: NDArray[np.int64], scores: Pair) -> int:
    """Places where the answers are not the same row.

    Raises:
        ValueError: two scores differ by more than float32's rounding.
    """
    worst = float(np.abs(scores[0] - scores[1]).max())
    if worst > 1e-5:
        raise ValueError(f"scores differ by {worst:.1e}, expected 1e-5")
    return int((mine != other).sum())


def compare(
    name: str,
    index: ExactIndex,
    other: Callable[..., Pair] | None,
    queries: NDArray[np.float32],
    k: int,
    *,
    rounds: int,
) -> dict[str, Any]:
    """A line of the record."""
    if other is None:
        return skipped(name, None, "FAISS is not installed")
    mine, (scores, indices) = index.search(queries, k), other(queries, k)
    unlike = differing(mine.indices, indices, (mine.scores, scores))
    runs = {"ours": lambda: index.search(queries, k), "theirs": lambda: other(queries, k)}
    times = measure(runs, rounds, repeats=max(1, 200 // len(queries)))
    a_query = ([second / len(queries) for second in times[side]] for side in ("ours", "theirs"))
    equal = f"{mine.indices.size - unlike} of {mine.indices.size} rows the same"
    return {**row(name, *a_query, goal=None, equal=equal), "unit": "ms a query"}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller gallery, fewer rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 5; quick 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    rounds = options.rounds or (2 if options.quick else 5)
    count = 10_000 if options.quick else 60_000
    rows = []
    for clusters in (False, True):
        gallery, queries = data(count, 1000, clusters=clusters)
        index = ExactIndex(gallery)
        kind = "clusters" if clusters else "random"
        flat, product = faiss_flat(gallery), plain(gallery)
        for k in (1, 10):
            for number in (1000,) if clusters else (1000, 1):
                title = f"{kind}, {count:,} rows, {number:,} queries, k {k}: FAISS flat"
                rows.append(compare(title, index, flat, queries[:number], k, rounds=rounds))
        title = f"{kind}, {count:,} rows, 1,000 queries, k 10: plain product"
        rows.append(compare(title, index, product, queries, 10, rounds=rounds))
    if options.json:
        write_benchmark(options.json, topic="search", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
