"""Exact thresholds whatever the scores: radix selection, four sweeps over the pairs in float64.

No score is kept and the counters take a few MiB, even where all scores are equal. For few pairs it
is the fastest way; for many, ``scan_search`` comes first and this is what it falls back on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from landmark_distill.images.truths import Bools, PairTruth

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
LEVELS = 4  # digits of a float64

Keys = npt.NDArray[np.uint64]
Found = tuple[list[int], list[int], list[float]]  # genuine, impostor pairs accepted; thresholds


def radix_search(
    rows: npt.NDArray[Any], truths: Mapping[str, PairTruth], targets: Sequence[float], *, block: int
) -> dict[str, Found]:
    """For each truth and target: pairs above the threshold, and the threshold."""
    searches = {name: _Search(targets, truth) for name, truth in truths.items()}
    for level in range(LEVELS):
        shift = (LEVELS - 1 - level) * DIGIT_BITS
        for search in searches.values():
            search.start_level()
        for first, second, keys, cells in _blocks(rows, block):
            for name, search in searches.items():
                if second.start == first.start:
                    truths[name].next_rows()
                matrix = truths[name].block(first, second)
                if matrix is None:
                    search.add(keys, shift, impostor=True)
                else:
                    genuine = matrix[cells] if cells is not None else matrix.ravel()
                    search.add(keys[~genuine], shift, impostor=True)
                    search.add(keys[genuine], shift, impostor=False)
        for search in searches.values():
            search.finish_level()
    return {name: search.found() for name, search in searches.items()}


class _Search:
    """Radix selection of the k-th largest impostor for each target, and genuine counts."""

    def __init__(self, targets: Sequence[float], truth: PairTruth) -> None:
        self.totals = (truth.genuine, truth.impostor)
        self.ranks = [allowed(target, truth.impostor) for target in targets]
        self.open = [k < truth.impostor for k in self.ranks]
        self.prefixes = [0] * len(targets)  # digits of the threshold known so far
        self.above = [[0, 0] for _ in targets]  # genuine, impostor pairs above the prefix
        self.expected: dict[int, tuple[int, int]] = {0: self.totals}
        self.counts: dict[int, list[npt.NDArray[np.int64]]] = {}
        self.first = True

    def start_level(self) -> None:
        wanted = {p for p, is_open in zip(self.prefixes, self.open, strict=True) if is_open}
        self.counts = {p: [np.zeros(BINS, np.int64) for _ in range(2)] for p in wanted}

    def add(self, keys: Keys, shift: int, *, impostor: bool) -> None:
        """Count the digit at ``shift`` of the keys that carry a wanted prefix."""
        if not keys.size or not self.counts:
            return
        if self.first:  # no prefix to compare
            digits = keys >> np.uint64(shift)
            self.counts[0][impostor] += np.bincount(digits.astype(np.int64), minlength=BINS)
            return
        # Most pairs lie below every threshold: drop them before they are compared.
        keys = keys[keys >= np.uint64(min(self.counts) << (shift + DIGIT_BITS))]
        heads = keys >> np.uint64(shift + DIGIT_BITS)
        for prefix, counts in self.counts.items():
            mine = keys[heads == np.uint64(prefix)]
            if mine.size:
                digits = (mine >> np.uint64(shift)) & np.uint64(BINS - 1)
                counts[impostor] += np.bincount(digits.astype(np.int64), minlength=BINS)

    def finish_level(self) -> None:
        """Choose the digit of each threshold; count what lies above it."""
        self.first = False
        if any(
            tuple(int(c.sum()) for c in counts) != self.expected[prefix]
            for prefix, counts in self.counts.items()
        ):
            # The sweeps must see the same bits, or the selection means nothing.
            raise ValueError("scores changed between two sweeps, expected a repeatable product")
        self.expected = {}
        for t, is_open in enumerate(self.open):
            if not is_open:
                continue
            genuine, impostor = self.counts[self.prefixes[t]]
            from_top = np.cumsum(impostor[::-1])
            place = int(np.searchsorted(from_top, self.ranks[t], side="right"))
            digit = BINS - 1 - place
            before = int(from_top[place - 1]) if place else 0
            self.ranks[t] -= before
            self.above[t][1] += before
            self.above[t][0] += int(genuine[digit + 1 :].sum())
            self.prefixes[t] = (self.prefixes[t] << DIGIT_BITS) | digit
            self.expected[self.prefixes[t]] = (int(genuine[digit]), int(impostor[digit]))

    def found(self) -> Found:
        genuine, impostor, thresholds = [], [], []
        for t, is_open in enumerate(self.open):
            good, bad = self.above[t] if is_open else self.totals
            genuine.append(good)
            impostor.append(bad)
            thresholds.append(_score(self.prefixes[t]) if is_open else -math.inf)
        return genuine, impostor, thresholds


def _blocks(
    rows: npt.NDArray[Any], block: int
) -> Iterator[tuple[slice, slice, Keys, Bools | None]]:
    """Every pair once: two row ranges, the keys of their pairs, and which cells these are."""
    count = len(rows)
    for i in range(0, count, block):
        first = slice(i, min(i + block, count))
        left = rows[first].astype(np.float64)
        for j in range(i, count, block):
            second = slice(j, min(j + block, count))
            scores = left @ rows[second].astype(np.float64).T
            cells = np.triu(np.ones(scores.shape, bool), 1) if i == j else None
            yield first, second, _keys(scores.ravel() if cells is None else scores[cells]), cells


def _keys(scores: npt.NDArray[np.float64]) -> Keys:
    """Unsigned integers in the same order as the scores (IEEE 754 bits)."""
    flat = np.ascontiguousarray(scores + 0.0)  # -0 becomes 0: equal scores, equal keys
    keys = flat.view(np.uint64)
    # Negative numbers: flip all bits, which reverses them; others: set the top bit.
    flip = np.where(np.signbit(flat), np.uint64(2**64 - 1), np.uint64(2**63))
    np.bitwise_xor(keys, flip, out=keys)
    return keys


def _score(key: int) -> float:
    """The score of a key: ``_keys`` backwards."""
    top = 1 << 63
    pattern = key ^ top if key & top else key ^ ((1 << 64) - 1)
    return float(np.array([pattern], dtype=np.uint64).view(np.float64)[0])


def allowed(target: float, impostors: int) -> int:
    """``floor(target * impostors)``, where 0.1 x 30 is 3 in spite of binary fractions."""
    product = target * impostors
    nearest = round(product)
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.floor(product)
