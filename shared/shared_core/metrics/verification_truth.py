"""Which pairs of samples are genuine: by the samples' labels, or by a mask over the pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.metrics.arrays import as_labels

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PairMask:
    """Truth for pairs instead of samples: 1 = genuine.

    ``values`` has N (N - 1) / 2 entries for the pairs (0,1), (0,2), ..., (0,N-1), (1,2),
    ...: the order of ``numpy.triu_indices(N, 1)``. It may be a memory map.
    """

    values: npt.NDArray[Any]


class Truth:
    """Tells which pairs of a block are genuine.

    Raises:
        ValueError: the truth is not one for ``count`` samples, or has no genuine or no impostor
            pair.
    """

    def __init__(self, name: str, truth: npt.ArrayLike | PairMask, count: int) -> None:
        title = f"truth {name!r}" if name else "truth"
        self.count = count
        self.labels: npt.NDArray[np.int32] | None = None
        self.mask: npt.NDArray[Any] | None = None
        pairs = count * (count - 1) // 2
        if isinstance(truth, PairMask):
            self.mask = np.asanyarray(truth.values)
            if self.mask.shape != (pairs,):
                raise ValueError(
                    f"{title}: mask has shape {self.mask.shape}, expected ({pairs},) for "
                    f"{count} features"
                )
            self.genuine = self._count_mask()
        else:
            labels = as_labels(truth)
            if len(labels) != count:
                raise ValueError(f"{title}: got {len(labels)} labels for {count} features")
            _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
            self.labels = codes.reshape(-1).astype(np.int32)
            self.genuine = sum(int(n) * (int(n) - 1) // 2 for n in sizes)
        self.impostor = pairs - self.genuine
        title = title if name else "the labels"
        for total, word in ((self.genuine, "genuine"), (self.impostor, "impostor")):
            if total == 0:
                raise ValueError(f"{title} make no {word} pair, expected at least one")

    def block(self, first: slice, second: slice) -> Bools | None:
        """``(rows, columns)``: where a pair is genuine; None: nowhere.

        On the diagonal only the cells above it mean anything.
        """
        if self.labels is not None:
            left, right = self.labels[first], self.labels[second]
            same: Bools = left[:, None] == right[None, :]
            return same if same.any() else None
        mask = self._mask()
        found = np.zeros((first.stop - first.start, second.stop - second.start), bool)
        for i in range(first.start, first.stop):
            start = max(second.start, i + 1)
            # Pair (i, j) lies at i (2 N - i - 1) / 2 + (j - i - 1).
            offset = i * (2 * self.count - i - 1) // 2 - i - 1
            part = np.asarray(mask[offset + start : offset + second.stop])
            found[i - first.start, start - second.start :] = part != 0
        return found

    def pairs(self, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Entries of the mask at ``places``."""
        return np.asarray(self._mask()[places])

    def next_rows(self) -> None:
        """Called before each range of rows: forget the pages of a mapped file read so far."""
        mask = self.mask
        if type(mask) is np.memmap and mask.filename is not None and mask.mode == "r":
            self.mask = np.memmap(mask.filename, mask.dtype, "r", mask.offset, mask.shape)

    def _mask(self) -> npt.NDArray[Any]:
        if self.mask is None:  # one of the two always exists
            raise ValueError("truth without labels or mask")
        return self.mask

    def _count_mask(self) -> int:
        step, total = 1 << 24, 0
        for start in range(0, len(self._mask()), step):
            total += int(np.count_nonzero(self._mask()[start : start + step]))
            self.next_rows()
        return total
