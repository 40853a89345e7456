"""Open-set verification: the share of genuine pairs accepted at given false-accept rates.

All ``N (N - 1) / 2`` pairs of features are scored, block by block; no score is kept. The
threshold is found exactly by radix selection on the bits of the scores: float32 needs two
sweeps over the pairs (16 bits each), float64 four, and the counters take a few MiB
whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import Floats, as_labels

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS


@dataclass(frozen=True)
class Verification:
    """What ``verification_rate`` found, one value for each target; shapes (T,)."""

    far_targets: tuple[float, ...]
    rates: Floats  # genuine pairs accepted / genuine pairs
    thresholds: Floats  # a pair is accepted when its score is greater than this
    far: Floats  # impostor pairs accepted / impostor pairs; never above the target
    genuine: int  # pairs of the same class
    impostor: int  # pairs of different classes


@dataclass(frozen=True)
class PairMask:
    """Truth for pairs instead of samples: 1 = genuine.

    ``values`` has N (N - 1) / 2 entries for the pairs (0,1), (0,2), ..., (0,N-1), (1,2),
    ...: the order of ``numpy.triu_indices(N, 1)``. It may be a memory map.
    """

    values: npt.NDArray[Any]


def verification_rate(
    features: npt.ArrayLike,
    labels: npt.ArrayLike | PairMask,
    *,
    far_targets: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
    block: int = 1024,
    normalize: bool = True,
    dtype: npt.DTypeLike = np.float32,
) -> Verification:
    """Verification rate (true-accept rate) at each false-accept rate (FAR), over all pairs.

    A pair is accepted when its score is **greater than** the threshold. For a target ``a``
    and M impostor pairs, ``k = floor(a M)`` false accepts are allowed and the threshold is
    the (k+1)-th largest impostor score: the lowest threshold whose FAR is at most ``a``.
    Impostors that tie with it are all rejected, so the reached FAR may be lower. With
    ``k >= M`` everything is accepted (threshold -inf).

    Args:
        features: (N, D), finite.
        labels: class of each sample (N,), or a ``PairMask``.
        far_targets: fractions in [0, 1], any order.
        block: rows and columns scored at a time; memory grows with its square.
        normalize: scale each feature to length 1, so that scores are cosines; a zero
            feature stays zero. ``False`` takes inner products as they are.
        dtype: float32 or float64, in which the scores are computed and compared.

    Raises:
        ValueError: shapes do not fit, not finite, no genuine or no impostor pair.
    """
    return verification_rates(
        features,
        {"": labels},
        far_targets=far_targets,
        block=block,
        normalize=normalize,
        dtype=dtype,
    )[""]


def verification_rates(
    features: npt.ArrayLike,
    truths: Mapping[str, npt.ArrayLike | PairMask],
    *,
    far_targets: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
    block: int = 1024,
    normalize: bool = True,
    dtype: npt.DTypeLike = np.float32,
) -> dict[str, Verification]:
    """``verification_rate`` for several truths, such as coarse and fine labels, at one cost.

    Args:
        features: (N, D), finite.
        truths: name -> labels (N,) or ``PairMask``; other arguments as there.
    """
    kind = np.dtype(dtype)
    if kind not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype is {kind}, expected float32 or float64")
    if block < 1:
        raise ValueError(f"block is {block}, expected at least 1")
    if not truths:
        raise ValueError("got no truths, expected at least one")
    targets = tuple(float(t) for t in far_targets)
    if not targets or not all(0 <= t <= 1 for t in targets):
        raise ValueError(f"far_targets are {targets}, expected fractions in [0, 1]")
    rows = _prepared(features, kind, normalize)
    sources = {name: _Truth(name, truth, len(rows)) for name, truth in truths.items()}
    searches = {name: _Search(targets) for name in sources}
    levels = kind.itemsize * 8 // DIGIT_BITS
    for level in range(levels):
        shift = (levels - 1 - level) * DIGIT_BITS
        for search in searches.values():
            search.start_level()
        for first, second, keys in _blocks(rows, block):
            for name, search in searches.items():
                genuine = sources[name].genuine(first, second)
                if genuine is None:
                    search.add(keys, shift, impostor=True)
                else:
                    search.add(keys[~genuine], shift, impostor=True)
                    search.add(keys[genuine], shift, impostor=False)
        for name, search in searches.items():
            search.finish_level(name)
    return {name: search.result(kind) for name, search in searches.items()}


class _Truth:
    """Tells which pairs of a block are genuine."""

    def __init__(self, name: str, truth: npt.ArrayLike | PairMask, count: int) -> None:
        title = f"truth {name!r}" if name else "truth"
        self.count = count
        self.labels: npt.NDArray[np.int64] | None = None
        self.mask: npt.NDArray[Any] | None = None
        if isinstance(truth, PairMask):
            self.mask = np.asanyarray(truth.values)
            if self.mask.shape != (count * (count - 1) // 2,):
                raise ValueError(
                    f"{title}: mask has shape {self.mask.shape}, expected "
                    f"({count * (count - 1) // 2},) for {count} features"
                )
        else:
            self.labels = as_labels(truth)
            if len(self.labels) != count:
                raise ValueError(f"{title}: got {len(self.labels)} labels for {count} features")

    def genuine(self, first: slice, second: slice) -> npt.NDArray[np.bool_] | None:
        """Which of the block's pairs, in ``_blocks``' order, are genuine; None: none is."""
        if self.labels is not None:
            left, right = self.labels[first], self.labels[second]
            if first != second and not np.isin(left, right).any():
                return None
            same = left[:, None] == right[None, :]
            pairs: npt.NDArray[np.bool_] = (
                same[_upper(len(left))] if first == second else same.ravel()
            )
            return pairs
        mask = self.mask
        if mask is None:  # one of the two always exists
            raise ValueError("truth without labels or mask")
        parts = []
        for i in range(first.start, first.stop):
            start = max(second.start, i + 1)
            # Pair (i, j) lies at i (2 N - i - 1) / 2 + (j - i - 1).
            offset = i * (2 * self.count - i - 1) // 2 - i - 1
            parts.append(np.asarray(mask[offset + start : offset + second.stop]) != 0)
        return np.concatenate(parts)


class _Search:
    """Radix selection of the k-th largest impostor for each target, and genuine counts."""

    def __init__(self, targets: tuple[float, ...]) -> None:
        self.targets = targets
        self.prefixes: list[int] = [0] * len(targets)  # digits of the threshold known so far
        self.ranks: list[int] | None = None  # rank left within the prefix, 0-based from the top
        self.above = [[0, 0] for _ in targets]  # genuine, impostor pairs above the prefix
        self.totals = [0, 0]  # genuine, impostor pairs
        self.open: list[bool] = [True] * len(targets)
        self.expected: dict[int, tuple[int, int]] = {}
        self.counts: dict[int, list[npt.NDArray[np.int64]]] = {}

    def start_level(self) -> None:
        wanted = {p for p, is_open in zip(self.prefixes, self.open, strict=True) if is_open}
        self.counts = {p: [np.zeros(BINS, np.int64) for _ in range(2)] for p in wanted}

    def add(self, keys: npt.NDArray[Any], shift: int, *, impostor: bool) -> None:
        """Count the digit at ``shift`` of the keys that carry a wanted prefix."""
        if not keys.size:
            return
        if self.ranks is None:  # first level: no prefix to compare
            digits = keys >> keys.dtype.type(shift)
            self.counts[0][impostor] += np.bincount(digits.astype(np.int64), minlength=BINS)
            return
        if not self.counts:
            return
        # Most pairs lie below every threshold: drop them before they are compared.
        keys = keys[keys >= keys.dtype.type(min(self.counts) << (shift + DIGIT_BITS))]
        heads = keys >> keys.dtype.type(shift + DIGIT_BITS)
        for prefix, counts in self.counts.items():
            mine = keys[heads == keys.dtype.type(prefix)]
            if mine.size:
                digits = (mine >> mine.dtype.type(shift)) & mine.dtype.type(BINS - 1)
                counts[impostor] += np.bincount(digits.astype(np.int64), minlength=BINS)

    def finish_level(self, name: str) -> None:
        """Choose the digit of each threshold; count what lies above it."""
        title = f"truth {name!r}" if name else "the labels"
        if self.ranks is None:
            self.totals = [int(counts.sum()) for counts in self.counts[0]]
            for total, word in zip(self.totals, ("genuine", "impostor"), strict=True):
                if total == 0:
                    raise ValueError(f"{title} make no {word} pair, expected at least one")
            allowed = [_allowed(target, self.totals[1]) for target in self.targets]
            self.ranks = allowed
            self.open = [k < self.totals[1] for k in allowed]
        elif any(
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

    def result(self, kind: np.dtype[Any]) -> Verification:
        rates, thresholds, far = [], [], []
        for t, is_open in enumerate(self.open):
            genuine, impostor = self.above[t] if is_open else self.totals
            rates.append(genuine / self.totals[0])
            far.append(impostor / self.totals[1])
            thresholds.append(_score(self.prefixes[t], kind) if is_open else -math.inf)
        return Verification(
            far_targets=self.targets,
            rates=np.array(rates),
            thresholds=np.array(thresholds),
            far=np.array(far),
            genuine=self.totals[0],
            impostor=self.totals[1],
        )


def _prepared(features: npt.ArrayLike, kind: np.dtype[Any], normalize: bool) -> npt.NDArray[Any]:
    given = np.asarray(features)
    if given.ndim != 2 or len(given) < 2:
        raise ValueError(f"features have shape {given.shape}, expected (N, D) with N of at least 2")
    rows = np.array(given, dtype=kind, order="C")  # a copy: it is scaled in place
    for start in range(0, len(rows), 4096):  # small parts: no second copy of the features
        part = rows[start : start + 4096]
        if not np.isfinite(part).all():
            raise ValueError("features hold NaN or infinity, expected finite numbers")
        if normalize:
            lengths = np.sqrt(np.square(part, dtype=np.float64).sum(axis=1, keepdims=True))
            part /= np.where(lengths == 0, 1, lengths)
    return rows


def _blocks(rows: npt.NDArray[Any], block: int) -> Iterator[tuple[slice, slice, npt.NDArray[Any]]]:
    """Every pair once: two row ranges and the keys of their pairs, flat, row by row."""
    count = len(rows)
    for i in range(0, count, block):
        first = slice(i, min(i + block, count))
        for j in range(i, count, block):
            second = slice(j, min(j + block, count))
            scores = rows[first] @ rows[second].T
            flat = scores[_upper(len(scores))] if i == j else scores.ravel()
            yield first, second, _keys(flat)


def _upper(size: int) -> npt.NDArray[np.bool_]:
    """Which cells of a diagonal block hold a pair that was not seen yet."""
    return np.triu(np.ones((size, size), bool), 1)


def _keys(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Unsigned integers in the same order as the scores (IEEE 754 bits)."""
    flat = np.ascontiguousarray(scores + 0.0)  # -0 becomes 0: equal scores, equal keys
    bits = flat.dtype.itemsize * 8
    keys = flat.view(np.uint32 if bits == 32 else np.uint64)
    # Negative numbers: flip all bits, which reverses them; others: set the top bit.
    flip = np.where(
        np.signbit(flat), keys.dtype.type(2**bits - 1), keys.dtype.type(2 ** (bits - 1))
    )
    np.bitwise_xor(keys, flip, out=keys)
    return keys


def _score(key: int, kind: np.dtype[Any]) -> float:
    """The score of a key: ``_keys`` backwards."""
    bits = kind.itemsize * 8
    top = 1 << (bits - 1)
    pattern = key ^ top if key & top else key ^ ((1 << bits) - 1)
    unsigned = np.array([pattern], dtype=np.uint32 if bits == 32 else np.uint64)
    return float(unsigned.view(kind)[0])


def _allowed(target: float, impostors: int) -> int:
    """``floor(target * impostors)``, where 0.1 x 30 is 3 in spite of binary fractions."""
    product = target * impostors
    nearest = round(product)
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.floor(product)
