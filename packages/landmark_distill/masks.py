"""Truth of the open-set test: masks over pairs, label files, or the folders that images lie in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from landmark_distill.file_lists import read_list
from shared_core.checkpoints import atomic_write
from shared_core.metrics import PairMask

Truth = NDArray[np.int64] | PairMask
STEP = 1 << 24  # entries of a mask looked at together


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


def write_mask(path: str | Path, labels: Sequence[int] | NDArray[np.integer]) -> None:
    """Write the mask that labels make, uint8, a row of pairs at a time."""
    codes = np.asarray(labels)
    if codes.ndim != 1 or len(codes) < 2:
        raise ValueError(f"labels have shape {codes.shape}, expected (N,) with N of at least 2")
    pairs = len(codes) * (len(codes) - 1) // 2

    def write(scratch: Path) -> None:
        mask = open_memmap(scratch, mode="w+", dtype=np.uint8, shape=(pairs,))
        start = 0
        for i in range(len(codes) - 1):
            stop = start + len(codes) - 1 - i
            mask[start:stop] = codes[i + 1 :] == codes[i]
            start = stop
        mask.flush()

    atomic_write(path, write)


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


def _codes(names: Sequence[str]) -> NDArray[np.int64]:
    places = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names], dtype=np.int64)


def _text_labels(path: Path) -> NDArray[np.int64]:
    if not path.is_file():
        raise FileNotFoundError(f"labels {path}: there is no such file")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"labels {path}: not UTF-8 text, expected .npy or text") from None
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
