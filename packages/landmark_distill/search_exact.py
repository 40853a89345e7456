"""Exact nearest neighbours: a fast scan in bfloat16 or float32, settled in float64.

The scan's score ``a`` of a pair is near the true one ``s``: ``|a - s| <= e`` with an ``e`` that is
computed from the data (below). When K is the k-th largest ``a`` of a query so far, all of its k
nearest have ``a >= K - 2 e``. Only pairs that reach this are scored again, each alone in float64,
and these scores rank. So both scans give the same answer, that of float64; equal scores are
ranked by row. Nothing is approximate but the time.

The bound: a row x is held as ``x' = bfloat16(x)``; with ``d = |x - x'|`` (measured, not assumed)
``|s - x'.y'| <= d_x |y| + |x'| d_y``. The product of x' and y' is exact in float32, and its sum
of n terms is off by at most ``n u |x'| |y'|`` in any order. The result is rounded to bfloat16 once
more: that keeps the order, and moves a score by 2^-8 of itself at most.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from landmark_distill.features import unit_rows

ENGINES = ("auto", "fp32", "bf16")
CHUNK = 8192  # gallery rows scanned at a time
FIRST = 2048  # and at the beginning, where every row is of interest
QUERIES = 512  # queries scanned at a time
PENDING = 1 << 20  # pairs that wait for their float64 score, at most, before it is computed
RESCORE = 256  # pairs scored at a time


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of each query, the nearest first; shapes (Q, k)."""

    scores: NDArray[np.float64]
    indices: NDArray[np.int64]


class ExactIndex:
    """A gallery that can be searched.

    Args:
        gallery: (G, D), finite.
        normalize: search by cosine; else by inner product.
        engine: of the scan: ``fp32``, ``bf16``, or ``auto``: the one that a short trial on this
            machine finds faster.

    Raises:
        ValueError: another shape, not finite, an unknown engine.
    """

    def __init__(
        self, gallery: NDArray[Any], *, normalize: bool = True, engine: str = "auto"
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}")
        self.normalize = normalize
        self.rows = _float32("gallery", gallery, normalize)
        self.engine = _faster(self.rows.shape[1]) if engine == "auto" else engine
        self._scan = _Bf16Rows(self.rows) if self.engine == "bf16" else None
        self._longest = _longest(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: NDArray[Any], k: int = 10) -> Neighbours:
        """The ``k`` nearest rows of each query; fewer when the gallery holds fewer.

        Raises:
            ValueError: queries of another width, or ``k`` below 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        rows = _float32("queries", queries, self.normalize)
        if rows.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"queries have {rows.shape[1]} features, the gallery {self.rows.shape[1]}; "
                "expected the same"
            )
        k = min(k, len(self.rows))
        parts = [self._some(rows[i : i + QUERIES], k) for i in range(0, len(rows), QUERIES)]
        return Neighbours(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.indices for part in parts]),
        )

    def _some(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        found = _Candidates(queries, self.rows, k)
        width = self.rows.shape[1]
        # Sums of float32 products, with room for their own rounding.
        summed = 1.1 * (width + 2) * 2.0**-24 / (1 - (width + 2) * 2.0**-24)
        lengths = np.sqrt(np.square(queries, dtype=np.float64).sum(axis=1))
        if self._scan is None:
            error = summed * lengths * self._longest
            for start, stop in _chunks(len(self.rows)):
                scores = queries @ self.rows[start:stop].T
                limits = found.limits(error, rounded=False)
                found.add(start, scores, scores >= _down(limits)[:, None])
            return found.settled()
        kept = torch.from_numpy(queries).bfloat16()
        gap = np.sqrt(np.square(queries - kept.float().numpy(), dtype=np.float64).sum(axis=1))
        held = self._scan
        error = gap * self._longest + (lengths + gap) * (held.gap + summed * held.longest)
        for start, stop in _chunks(len(self.rows)):
            scores = kept @ held.rows[start:stop].T
            limits = found.limits(error, rounded=True)
            found.add(start, scores, _reach(scores, limits))
        return found.settled()


def _chunks(count: int) -> list[tuple[int, int]]:
    starts = [0, *range(min(FIRST, CHUNK), count, CHUNK)]
    return list(zip(starts, [*starts[1:], count], strict=True))


class _Bf16Rows:
    """The gallery in bfloat16, and how far that is from it."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.rows = torch.empty(rows.shape, dtype=torch.bfloat16)
        self.gap = self.longest = 0.0
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            self.rows[start : start + CHUNK] = torch.from_numpy(part)
            held = self.rows[start : start + CHUNK].float().numpy()
            self.gap = max(self.gap, _longest(part - held))
            self.longest = max(self.longest, _longest(held))


class _Candidates:
    """The best of each query so far, and the pairs that may be among them."""

    def __init__(self, queries: NDArray[np.float32], rows: NDArray[np.float32], k: int) -> None:
        self.queries, self.rows, self.k = queries, rows, k
        self.best = np.full((len(queries), k), -np.inf)  # k largest scan scores, any order
        self.pending: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        self.waiting = 0
        self.scores = np.full((len(queries), k), -np.inf)  # settled
        self.indices = np.full((len(queries), k), len(rows), np.int64)
        self.lowest = np.full(len(queries), -np.inf)  # of the last call of ``limits``
        self.error: NDArray[np.float64] = np.zeros(len(queries))
        self.rounded = False

    def limits(self, error: NDArray[np.float64], *, rounded: bool) -> NDArray[np.float64]:
        """What a scan score must reach to be of interest, for each query."""
        self.error, self.rounded = error, rounded
        kth = self.best.min(axis=1)
        slack = 2 * error
        if rounded:  # K may have been rounded up, and what just reaches the limit down
            slack = slack + (np.where(np.isfinite(kth), np.abs(kth), 0) + slack) * 2.0**-7
        return kth - slack

    def add(self, start: int, scores: Any, reach: NDArray[np.bool_]) -> None:
        """Take the scan scores of a chunk where ``reach`` says so."""
        first = start == 0
        if first:  # everything reaches a limit of minus infinity: find a better one at once
            values = torch.as_tensor(scores).float()
            top = min(self.k, values.shape[1])
            self.best[:, :top] = torch.topk(values, top, dim=1).values.double().numpy()
            limits = self.limits(self.error, rounded=self.rounded)
            reach = values.numpy() >= _down(limits)[:, None]
        row, column = np.divmod(np.flatnonzero(reach), reach.shape[1])
        if isinstance(scores, torch.Tensor):
            picked = scores[torch.from_numpy(row), torch.from_numpy(column)].float().numpy()
        else:
            picked = scores[row, column]
        if not len(row):
            return
        self.pending.append((row, column + start, picked))
        self.waiting += len(row)
        if not first:  # the first chunk's are in ``best`` already
            self._raise_best(row, picked)
        if self.waiting > PENDING:
            self._settle()

    def _raise_best(self, row: NDArray[np.int64], picked: NDArray[np.float32]) -> None:
        """Let new scan scores into ``best``."""
        order = np.lexsort((-picked, row))
        row, picked = row[order], picked[order]
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        place = np.arange(len(row)) - np.repeat(begins, np.diff(begins, append=len(row)))
        kept = place < self.k
        fresh = np.full_like(self.best, -np.inf)
        fresh[row[kept], place[kept]] = picked[kept]
        touched = row[begins]
        both = np.concatenate([self.best[touched], fresh[touched]], axis=1)
        self.best[touched] = np.partition(both, self.k, axis=1)[:, self.k :]

    def _settle(self) -> None:
        """Score what is pending in float64 and keep the k best of each query."""
        row, column, scan = (np.concatenate(part) for part in zip(*self.pending, strict=True))
        self.pending, self.waiting = [], 0
        # By now the limits are higher than when these were taken.
        still = scan >= self.limits(self.error, rounded=self.rounded)[row]
        row, column = row[still], column[still]
        exact = np.empty(len(row))
        for start in range(0, len(row), RESCORE):
            part = slice(start, start + RESCORE)
            product = np.multiply(
                self.queries[row[part]], self.rows[column[part]], dtype=np.float64
            )
            product.sum(axis=1, out=exact[part])
        old = np.repeat(np.arange(len(self.queries)), self.k)
        row = np.concatenate([old, row])
        scores = np.concatenate([self.scores.ravel(), exact])
        column = np.concatenate([self.indices.ravel(), column])
        order = np.lexsort((column, -scores, row))
        row, scores, column = row[order], scores[order], column[order]
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        place = np.arange(len(row)) - np.repeat(begins, np.diff(begins, append=len(row)))
        kept = place < self.k
        self.scores = scores[kept].reshape(self.scores.shape)
        self.indices = column[kept].reshape(self.indices.shape)

    def settled(self) -> Neighbours:
        """The answer, when all chunks were added."""
        if self.pending:
            self._settle()
        return Neighbours(self.scores, self.indices)


def _reach(scores: torch.Tensor, limits: NDArray[np.float64]) -> NDArray[np.bool_]:
    """``scores >= limits[:, None]`` for bfloat16 scores, by their bits where limits allow it."""
    if limits.min() > 0:
        # The bits of a positive bfloat16, read as int16, grow with it; negative ones are below 0.
        down = torch.from_numpy(_down(limits))
        bits = (down.view(torch.int32) >> 16).to(torch.int16).numpy()  # cut off: rounds down
        return scores.view(torch.int16).numpy() >= bits[:, None]
    return scores.float().numpy() >= _down(limits)[:, None]


def _down(limits: NDArray[np.float64]) -> NDArray[np.float32]:
    """The limits in float32, never above what they were."""
    return np.nextafter(limits.astype(np.float32), np.float32(-np.inf))


def _longest(rows: NDArray[Any]) -> float:
    found = 0.0
    for start in range(0, len(rows), CHUNK):
        part = np.square(rows[start : start + CHUNK], dtype=np.float64).sum(axis=1)
        found = max(found, float(np.sqrt(part.max())))
    return found


def _float32(name: str, given: NDArray[Any], normalize: bool) -> NDArray[np.float32]:
    array = np.asarray(given)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, expected numbers (N, D)")
    rows = np.empty(array.shape, np.float32)
    for start in range(0, len(array), CHUNK):
        part = np.asarray(array[start : start + CHUNK])
        if not np.isfinite(part).all():
            raise ValueError(f"{name} hold NaN or infinity, expected finite numbers")
        rows[start : start + CHUNK] = unit_rows(part) if normalize else part
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} hold numbers that float32 cannot, expected smaller ones")
    return rows


def _faster(width: int) -> str:
    """The engine that scores a few rows of this width faster, here and now.

    bfloat16 has to keep its bound as well: a sum that is not in float32 would break it.
    """
    rng = np.random.default_rng(0)
    left, right = (
        unit_rows(rng.standard_normal((n, width))).astype(np.float32) for n in (256, 2048)
    )
    a, b = torch.from_numpy(left).bfloat16(), torch.from_numpy(right).bfloat16()
    times = {"fp32": [], "bf16": []}  # type: dict[str, list[float]]
    product = a @ b.T
    for _ in range(4):
        start = time.perf_counter()
        left @ right.T
        middle = time.perf_counter()
        product = a @ b.T
        times["fp32"].append(middle - start)
        times["bf16"].append(time.perf_counter() - middle)
    true = a.double().numpy() @ b.double().numpy().T
    off = np.abs(product.double().numpy() - true)
    if (off > np.abs(true) * 2.0**-8 + width * 2.0**-23).any():
        return "fp32"
    # Half as much again: the scan is not all, and bfloat16 leaves more to settle.
    return "bf16" if 1.5 * min(times["bf16"]) < min(times["fp32"]) else "fp32"
