"""Tab-separated image lists: several with label offsets, and the map that merges duplicates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_core.datasets import DatasetError

Labels = NDArray[np.int64]
COLUMNS = 3  # relative path, a remark, label


@dataclass(frozen=True)
class ImageList:
    """The lines of one list, in their order.

    Attributes:
        paths: the root folder joined with each line's first column.
        remarks: second column; nothing here depends on it.
        labels: third column, int64 ``(N,)``, 0 or more.
        source: the list's own path, for messages.
    """

    paths: tuple[Path, ...]
    remarks: tuple[str, ...]
    labels: Labels
    source: Path

    def __len__(self) -> int:
        return len(self.paths)


def read_list(path: str | Path, root: str | Path) -> ImageList:
    """Read one list: UTF-8, a line is ``relative/path<TAB>remark<TAB>label``.

    Empty lines are passed over.

    Raises:
        FileNotFoundError: no such list.
        DatasetError: not UTF-8, no lines, or a line of another form; the line's number is named.
    """
    path, root = Path(path), Path(root)
    if not path.is_file():
        raise FileNotFoundError(f"image list {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: byte {error.start} is not UTF-8, expected a list") from None
    paths, remarks, labels = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        parts = line.split("\t")
        if len(parts) != COLUMNS or not parts[0]:
            raise DatasetError(
                f"{path}, line {number}: {len(parts)} columns in {line[:60]!r}, expected "
                "path, remark and label with a tab between each"
            )
        label = parts[2].strip()
        if not (label.isascii() and label.isdigit()):
            raise DatasetError(
                f"{path}, line {number}: label {parts[2][:20]!r}, expected a whole number of "
                "0 or more"
            )
        paths.append(root / parts[0])
        remarks.append(parts[1])
        labels.append(int(label))
    if not paths:
        raise DatasetError(f"{path} has no lines, expected path, remark and label on each")
    return ImageList(tuple(paths), tuple(remarks), np.array(labels, dtype=np.int64), path)


def label_offsets(lists: Sequence[ImageList]) -> list[int]:
    """What is added to each list's labels: the number of labels in the lists before it.

    Raises:
        DatasetError: a list whose labels are not 0 to n - 1, which would make two lists' labels
            collide.
    """
    offsets, total = [], 0
    for one in lists:
        distinct = np.unique(one.labels)
        if distinct[-1] != len(distinct) - 1:
            missing = int(np.setdiff1d(np.arange(len(distinct)), distinct)[0])
            raise DatasetError(
                f"{one.source}: {len(distinct)} labels up to {int(distinct[-1])} and none is "
                f"{missing}: expected 0 to {len(distinct) - 1} without gaps, as lists are joined"
            )
        offsets.append(total)
        total += len(distinct)
    return offsets


def read_remap(path: str | Path) -> dict[int, int]:
    """The map ``label -> final label`` that merges duplicate landmarks.

    A ``.json`` file holds ``{"label": final}`` or ``{"label": [final, score]}``; any other is a
    torch file of a dictionary ``{label: (final, score)}``, as the original wrote it. Scores are
    read and not used. Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: of another form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"label map {path}: there is no such file")
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DatasetError(f"label map {path} is not JSON: {error}") from None
    else:
        import torch

        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can raise nearly anything
            raise DatasetError(
                f"label map {path}: no torch file of plain numbers ({type(error).__name__})"
            ) from None
    if not isinstance(content, dict) or not content:
        raise DatasetError(f"label map {path}: expected a dictionary label -> (final, score)")
    found = {}
    for key, value in content.items():
        final = value[0] if isinstance(value, list | tuple) and len(value) == 2 else value
        try:
            whole = int(key), int(final)
            good = min(whole) >= 0 and whole == (float(key), float(final))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise DatasetError(
                f"label map {path}: {key!r} -> {value!r}, expected two labels of 0 or more"
            )
        found[whole[0]] = whole[1]
    return found


def joined_labels(
    lists: Sequence[ImageList], *, remap: Mapping[int, int] | None = None
) -> tuple[Labels, int]:
    """Labels of the lists behind one another: offset, then mapped where the map knows them.

    Returns:
        int64 ``(N,)`` and the number of classes, the highest final label plus one (gaps stay: a
        teacher's head has a row for each).
    """
    offsets = label_offsets(lists)
    labels = np.concatenate([one.labels + k for one, k in zip(lists, offsets, strict=True)])
    return remapped(labels, remap), int(remapped(labels, remap).max()) + 1


def remapped(labels: Labels, remap: Mapping[int, int] | None) -> Labels:
    """``labels`` with the map applied where it has an entry; the others stay as they are."""
    if not remap:
        return labels
    size = int(max(labels.max(initial=0), max(remap))) + 1
    table = np.arange(size, dtype=np.int64)
    table[np.fromiter(remap, dtype=np.int64)] = np.fromiter(remap.values(), dtype=np.int64)
    return table[labels]
