"""Which pairs are genuine: by labels or by a mask over the pairs, read from files and folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landmark_distill.images.file_lists import read_list
from shared_core.metrics.arrays import as_labels
from shared_core.texts import read_text

Bools = NDArray[np.bool_]
STEP = 1 << 24  # entries of a mask looked at together


@dataclass(frozen=True)
class PairMask:
    """Truth for pairs instead of samples: 1 = genuine.

    ``values`` has N (N - 1) / 2 entries for the pairs (0,1), (0,2), ..., (0,N-1), (1,2),
    ...: the order of ``numpy.triu_indices(N, 1)``. It may be a memory map.
    """

    values: NDArray[Any]


Truth = NDArray[np.int64] | PairMask  # of samples, or of their pairs


class NoPairsError(ValueError):
    """A truth by which all pairs are genuine, or none is: nothing can be verified."""


class PairTruth:
    """Tells which pairs of a block are genuine.

    Raises:
        ValueError: the truth is not one for ``count`` samples.
        NoPairsError: it has no genuine or no impostor pair.
    """

    def __init__(self, name: str, truth: ArrayLike | PairMask, count: int) -> None:
        title = f"truth {name!r}" if name else "truth"
        self.count = count
        self.labels: NDArray[np.int32] | None = None
        self.mask: NDArray[Any] | None = None
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
        title = title if name else "the truth"
        for total, word in ((self.genuine, "genuine"), (self.impostor, "impostor")):
            if total == 0:
                raise NoPairsError(f"{title} makes no {word} pair, expected at least one")

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

    def pairs(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Entries of the mask at ``places``."""
        return np.asarray(self._mask()[places])

    def next_rows(self) -> None:
        """Called before each range of rows: forget the pages of a mapped file read so far."""
        mask = self.mask
        if type(mask) is np.memmap and mask.filename is not None and mask.mode == "r":
            self.mask = np.memmap(mask.filename, mask.dtype, "r", mask.offset, mask.shape)

    def _mask(self) -> NDArray[Any]:
        if self.mask is None:  # one of the two always exists
            raise ValueError("truth without labels or mask")
        return self.mask

    def _count_mask(self) -> int:
        total = 0
        for start in range(0, len(self._mask()), STEP):
            total += int(np.count_nonzero(self._mask()[start : start + STEP]))
            self.next_rows()
        return total


def read_mask(path: str | Path, count: int) -> PairMask:
    """Map a mask: .npy with an entry, 0 or 1, for each pair (0,1), (0,2), ..., (1,2), ...

    Raises:
        FileNotFoundError: no such file.
        ValueError: not N (N - 1) / 2 entries for ``count`` features, or other values.
    """
    values = _load(Path(path))
    pairs = count * (count - 1) // 2
    if values.shape != (pairs,) or values.dtype.kind not in "biuf":
        raise ValueError(
            f"mask {path}: holds {values.dtype} {values.shape}, expected ({pairs},) of 0 and 1 "
            f"for {count} features"
        )
    if values.dtype != bool:
        for start in range(0, pairs, STEP):
            part = np.asarray(values[start : start + STEP])
            wrong = (part != 0) & (part != 1)
            if wrong.any():
                place = int(wrong.argmax())
                raise ValueError(
                    f"mask {path}: entry {start + place} is {part[place]}, expected 0 or 1"
                )
    return PairMask(values)


def read_truth(path: str | Path, count: int) -> Truth:
    """Labels or a mask for ``count`` features, told apart by form.

    Args:
        path: ``.npy`` of N whole numbers (labels) or of N (N - 1) / 2 zeros and ones (a mask);
            an image list (path, remark, label with tabs); any other text, a label a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another number of entries, or none of these forms.
    """
    path = Path(path)
    if path.suffix == ".npy":
        values = _load(path)
        if values.shape != (count,):
            return read_mask(path, count)
        if values.dtype.kind not in "iub" or (values.size and values.min() < 0):
            raise ValueError(f"labels {path}: hold {values.dtype}, expected whole numbers from 0")
        return np.asarray(values, dtype=np.int64)
    labels = _text_labels(path)
    if len(labels) != count:
        raise ValueError(f"labels {path}: {len(labels)} lines for {count} features")
    return labels


def folder_labels(paths: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """``fine`` by the folder of each image, ``coarse`` by the first folder of its path.

    Args:
        paths: relative, with ``/``; ``coarse/fine/image`` or ``class/image``.

    Raises:
        ValueError: an image that lies in no folder.
    """
    parts = [path.split("/") for path in paths]
    alone = next((path for path, p in zip(paths, parts, strict=True) if len(p) < 2), None)
    if alone is not None:
        raise ValueError(f"{alone} lies in no folder, expected class/image or coarse/fine/image")
    return {
        "coarse": _codes([p[0] for p in parts]),
        "fine": _codes(["/".join(p[:-1]) for p in parts]),
    }


def folder_truths(paths: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """:func:`folder_labels`, and ``fine`` alone where the folders have one level."""
    found = folder_labels(paths)
    return found if (found["coarse"] != found["fine"]).any() else {"fine": found["fine"]}


def usable_truths(
    truths: Mapping[str, Truth], count: int
) -> tuple[dict[str, Truth], tuple[str, ...]]:
    """The truths that say something of ``count`` images, and why others do not.

    Raises:
        ValueError: none does, or one is not of so many images.
    """
    kept, said = {}, []
    for name, truth in truths.items():
        try:
            PairTruth(name, truth, count)
            kept[name] = truth
        except NoPairsError as error:
            said.append(f"{name} is not tested: {error}")
    if not kept:
        raise ValueError(f"the test images can show nothing: {'; '.join(said)}")
    return kept, tuple(said)


def _codes(names: Sequence[str]) -> NDArray[np.int64]:
    places = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names], dtype=np.int64)


def _text_labels(path: Path) -> NDArray[np.int64]:
    if not path.is_file():
        raise FileNotFoundError(f"labels {path}: there is no such file")
    lines = [line for line in read_text(path).lines() if line.strip()]
    if lines and lines[0].count("\t") == 2:
        return read_list(path, ".").labels
    return _codes([line.strip() for line in lines])


def _load(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected a mask or labels")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise ValueError(f"{path} is no .npy file of numbers, expected a mask or labels") from None
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{path} is an archive, expected one array")
    return values
