"""Exact thresholds in one sweep over the pairs: bracket by a sample, then settle in float64.

1. A sample of features says between which two scores each threshold must lie.
2. One sweep over all pairs counts what lies above each bracket and keeps what lies inside.
3. The sweep's scores ``a`` differ from the true ones ``s`` by at most a proven ``e``, and so do
   order statistics. With ``A`` the wanted impostor's score in the sweep, a pair with
   ``a > A + 2 e`` is surely above the true threshold and one with ``a < A - 2 e`` surely below.
   Only those between are scored again, each pair alone in float64, and they decide.

So the answer is that of float64 scores, whatever block size or BLAS computed the sweep. When the
counts show that a bracket missed its threshold, or too many pairs lie inside one (all scores
equal, say), the caller takes the slower way.

Source of the bound: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1:
``|fl(x.y) - x.y| <= n u / (1 - n u) |x|.|y|`` in any order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from landmark_distill.images.truths import Bools, PairTruth
from landmark_distill.judging.radix_search import Found, allowed

SAMPLE = 4096  # features at most in the sample; their pairs are all scored
SIGMAS = 6.0  # half a bracket, in standard errors of the sample's estimate
EXTRA = 30  # and in ranks of the sample: where ranks are few, errors are not normal
MOST_KEPT = 1 << 25  # pairs inside brackets; about 24 bytes each
DENSE = 0.02  # share of pairs above which picking them out costs more than comparing all
RESCORE = 256  # pairs scored again at a time

Floating = npt.NDArray[np.floating[Any]]


@dataclass
class _Bracket:
    """Scores ``low <= a <= high``, what lies above them, and the pairs inside."""

    low: float
    high: float
    share: float  # of the sample's pairs at or above ``low``
    above: int = 0  # pairs, genuine or not
    genuine_above: dict[str, int] = field(default_factory=dict)
    kept: list[tuple[npt.NDArray[Any], ...]] = field(default_factory=list)


def scan_search(
    rows: Floating, truths: Mapping[str, PairTruth], targets: Sequence[float], *, block: int
) -> dict[str, Found] | None:
    """For each truth and target: pairs above the threshold, and the threshold; None: try radix."""
    error = score_error(rows)
    if not math.isfinite(error):
        return None
    wanted = _sample_brackets(rows, truths, targets, error)
    brackets = _merge(list(wanted.values()))
    if not _sweep(rows, truths, brackets, block):
        return None
    found: dict[str, Found] = {}
    for number, (name, truth) in enumerate(truths.items()):
        genuine, impostor, thresholds = [], [], []
        for target in targets:
            if allowed(target, truth.impostor) >= truth.impostor:
                genuine.append(truth.genuine)
                impostor.append(truth.impostor)
                thresholds.append(-math.inf)
                continue
            low = wanted[name, target].low
            bracket = next(b for b in brackets if b.low <= low <= b.high)
            settled = _settle(rows, bracket, name, number, allowed(target, truth.impostor), error)
            if settled is None:
                return None
            genuine.append(settled[0])
            impostor.append(settled[1])
            thresholds.append(settled[2])
        found[name] = (genuine, impostor, thresholds)
    return found


def score_error(rows: Floating) -> float:
    """Largest possible distance of a product of two rows, in their own precision, from the truth.

    Infinite where a product might overflow.
    """
    info = np.finfo(rows.dtype)
    # Squared lengths in the rows' own precision: quick, and short by n u of themselves at most.
    with np.errstate(over="ignore"):
        longest = float(np.einsum("ij,ij->i", rows, rows).max())
    if not longest <= float(info.max) / 4:
        return math.inf
    n = rows.shape[1] + 2
    unit = float(info.eps) / 2
    # A tenth more for rounding here and in the lengths; the last term is for underflow.
    return float(1.1 * n * unit / (1 - n * unit) * longest + n * float(info.tiny))


def _sample_brackets(
    rows: Floating, truths: Mapping[str, PairTruth], targets: Sequence[float], error: float
) -> dict[tuple[str, float], _Bracket]:
    """A bracket for each truth and target, from all pairs of a random sample of the rows."""
    size = min(len(rows), SAMPLE, max(1024, len(rows) // 8))
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), size, replace=False))
    picked = rows[chosen]
    scores = picked @ picked.T
    upper = np.triu(np.ones(scores.shape, bool), 1)
    made = {}
    for name, truth in truths.items():
        bad = upper & ~_genuine_cells(truth, chosen)
        impostors = np.sort(scores[bad])
        for target in targets:
            rank = allowed(target, truth.impostor)
            if rank >= truth.impostor:
                continue
            share = (rank + 1) / truth.impostor
            made[name, target] = _bracket(scores, bad, impostors, share, 2.5 * error)
    return made


def _genuine_cells(truth: PairTruth, chosen: npt.NDArray[np.int64]) -> Bools:
    """Genuine pairs among the chosen rows; what is on and below the diagonal means nothing."""
    if truth.labels is not None:
        codes = truth.labels[chosen]
        same: Bools = codes[:, None] == codes[None, :]
        return same
    cells = np.zeros((len(chosen), len(chosen)), bool)
    for number, i in enumerate(chosen.tolist()):
        later = chosen[number + 1 :]
        if len(later):
            offset = i * (2 * truth.count - i - 1) // 2 - i - 1
            cells[number, number + 1 :] = np.asarray(truth.pairs(offset + later)) != 0
    return cells


def _bracket(
    scores: Floating, bad: Bools, impostors: Floating, share: float, margin: float
) -> _Bracket:
    """Where the score lies that ``share`` of all impostors reach, judged by the sample's."""
    count = len(impostors)
    if count == 0:
        return _Bracket(-math.inf, math.inf, 1.0)
    rank = share * count
    guess = impostors[max(0, count - 1 - int(rank))]
    # The sample's pairs are not independent: a row with large scores has many of them. Each row's
    # own share shows how much that matters (variance of a U-statistic: 4 zeta_1 / rows).
    reach = (scores >= guess) & bad
    mine = bad.sum(axis=0) + bad.sum(axis=1)
    rows = (reach.sum(axis=0) + reach.sum(axis=1))[mine > 0] / mine[mine > 0]
    spread = 2 * float(rows.std()) / math.sqrt(len(rows)) * count + math.sqrt(rank)
    low_rank = int(rank + SIGMAS * spread + EXTRA)
    high_rank = int(rank - SIGMAS * spread - EXTRA)
    low = float(impostors[count - 1 - low_rank]) - margin if low_rank < count else -math.inf
    high = float(impostors[count - 1 - high_rank]) + margin if high_rank > 0 else math.inf
    return _Bracket(low, high, min(1.0, low_rank / count))


def _merge(brackets: list[_Bracket]) -> list[_Bracket]:
    """Disjoint brackets, highest first."""
    merged: list[_Bracket] = []
    for one in sorted(brackets, key=lambda b: -b.high):
        if merged and one.high >= merged[-1].low:
            merged[-1].low = min(merged[-1].low, one.low)
            merged[-1].share = max(merged[-1].share, one.share)
        else:
            merged.append(_Bracket(one.low, one.high, one.share))
    return merged


def _sweep(
    rows: Floating, truths: Mapping[str, PairTruth], brackets: list[_Bracket], block: int
) -> bool:
    """Score every pair once; False: more pairs lie inside the brackets than are to be kept."""
    count, kept = len(rows), 0
    for bracket in brackets:
        bracket.genuine_above = dict.fromkeys(truths, 0)
    dense = [b for b in brackets if b.share > DENSE]
    sparse = [b for b in brackets if b.share <= DENSE]
    buffer = np.empty(min(block, count) ** 2, rows.dtype)
    for i in range(0, count, block):
        first = slice(i, min(i + block, count))
        for truth in truths.values():
            truth.next_rows()
        for j in range(i, count, block):
            second = slice(j, min(j + block, count))
            shape = (first.stop - i, second.stop - j)
            scores = buffer[: shape[0] * shape[1]].reshape(shape)
            np.matmul(rows[first], rows[second].T, out=scores)
            if i == j:
                scores[np.tril_indices(len(scores))] = np.nan  # in no bracket and above none
            flags = {}
            for name, truth in truths.items():
                cells = truth.block(first, second)
                flags[name] = None if cells is None else cells.ravel()
            flat = scores.ravel()
            for bracket in dense:
                kept += _count_dense(flat, flags, bracket, i, j, shape[1])
            if sparse:
                kept += _count_sparse(flat, flags, sparse, i, j, shape[1])
            if kept > MOST_KEPT:
                return False
    return True


Flags = Mapping[str, "Bools | None"]


def _count_dense(
    flat: Floating, flags: Flags, bracket: _Bracket, i: int, j: int, width: int
) -> int:
    """Compare all pairs of a block with a bracket that many of them reach."""
    inside = flat >= bracket.low
    if bracket.high < math.inf:
        above = flat > bracket.high
        bracket.above += int(np.count_nonzero(above))
        for name, genuine in flags.items():
            if genuine is not None:
                bracket.genuine_above[name] += int(np.count_nonzero(above & genuine))
        inside ^= above
    return _keep(bracket, flat, flags, np.flatnonzero(inside), i, j, width)


def _count_sparse(
    flat: Floating, flags: Flags, brackets: list[_Bracket], i: int, j: int, width: int
) -> int:
    """Pick out the pairs that reach the lowest of the brackets; look at those only."""
    places = np.flatnonzero(flat >= brackets[-1].low)
    scores, kept = flat[places], 0
    genuine = {name: None if all_ is None else all_[places] for name, all_ in flags.items()}
    for bracket in brackets:
        above = scores > bracket.high
        bracket.above += int(np.count_nonzero(above))
        for name, mine in genuine.items():
            if mine is not None:
                bracket.genuine_above[name] += int(np.count_nonzero(above & mine))
        inside = (scores >= bracket.low) & ~above
        kept += _keep(bracket, flat, flags, places[inside], i, j, width)
    return kept


def _keep(
    bracket: _Bracket,
    flat: Floating,
    flags: Flags,
    places: npt.NDArray[np.intp],
    i: int,
    j: int,
    width: int,
) -> int:
    """Keep score, rows and truths of the pairs inside a bracket; returns how many."""
    if places.size:
        row, column = np.divmod(places, width)
        genuine = [np.zeros(len(places), bool) if g is None else g[places] for g in flags.values()]
        pair = ((row + i).astype(np.int32), (column + j).astype(np.int32))
        bracket.kept.append((flat[places], *pair, np.array(genuine, dtype=bool)))
    return int(places.size)


def _settle(
    rows: Floating, bracket: _Bracket, name: str, number: int, rank: int, error: float
) -> tuple[int, int, float] | None:
    """``(genuine, impostor pairs accepted, threshold)`` by float64 scores; None: not inside."""
    if not bracket.kept:
        return None
    if len(bracket.kept[0]) == 4:  # join the blocks' parts, once a bracket
        parts = bracket.kept
        bracket.kept = [
            (
                *(np.concatenate([part[n] for part in parts]) for n in range(3)),
                np.concatenate([part[3] for part in parts], axis=1),
                np.full(sum(len(part[0]) for part in parts), np.nan),  # scores in float64
            )
        ]
    scores, left, right, flags, settled = bracket.kept[0]
    genuine = flags[number]
    rank -= bracket.above - bracket.genuine_above[name]  # among the impostors inside
    impostors = scores[~genuine]
    if not 0 <= rank < len(impostors):
        return None
    place = len(impostors) - 1 - rank
    # In float64: a float32 score plus 2 e would be rounded to the score's own grid.
    middle = float(np.partition(impostors, place)[place])
    low, high = middle - 2 * error, middle + 2 * error
    if low < bracket.low or high > bracket.high:
        return None
    wide = scores.astype(np.float64)
    sure, near = wide > high, (wide >= low) & (wide <= high)
    new = near & np.isnan(settled)  # another truth's threshold may lie beside this one
    settled[new] = _rescore(rows, left[new], right[new])
    exact = settled[near]
    rank -= int(np.count_nonzero(sure & ~genuine))
    bad = np.sort(exact[~genuine[near]])[::-1]
    threshold = float(bad[rank])
    accepted_genuine = (
        bracket.genuine_above[name]
        + int(np.count_nonzero(sure & genuine))
        + int(np.count_nonzero(exact[genuine[near]] > threshold))
    )
    accepted_impostor = (
        bracket.above
        - bracket.genuine_above[name]
        + int(np.count_nonzero(sure & ~genuine))
        + int(np.count_nonzero(bad > threshold))
    )
    return accepted_genuine, accepted_impostor, threshold


def _rescore(
    rows: Floating, left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Scores of single pairs in float64; equal rows give equal bits wherever they lie."""
    scores = np.empty(len(left))
    for start in range(0, len(left), RESCORE):
        part = slice(start, start + RESCORE)
        product = np.multiply(rows[left[part]], rows[right[part]], dtype=np.float64)
        product.sum(axis=1, out=scores[part])
    return scores + 0.0  # -0 becomes 0
