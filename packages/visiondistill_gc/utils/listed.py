"""Lists as PaddleClas users have them, laid out as class folders: ``train_list.txt`` and the like.

A line is ``relative/path.jpg 3``: the image below a folder, and the number of its class. The class
folders hold links, so nothing is copied where the file system has links.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from shared_core.datasets import DatasetError
from shared_core.texts import read_entries, say

FOLDER = "listed"  # in the run's folder


def read_list(path: Path) -> list[tuple[str, int]]:
    """The images of a list with the numbers of their classes, in its order.

    Raises:
        FileNotFoundError, ValueError: no such file, or no text.
        DatasetError: a line that is not a path and a number.
    """
    entries = read_entries(path)
    for note in entries.notes:
        say(f"note: {note}")
    rows = []
    for name, rest, number in zip(entries.names, entries.rests, entries.numbers, strict=True):
        image, _, label = f"{name}\t{rest}".rstrip().replace("\t", " ").rpartition(" ")
        if not image.strip() or not label.isdecimal():
            raise DatasetError(
                f"{path} line {number}: {name[:80]!r}, expected a path and the number of a class"
            )
        rows.append((image.strip().replace("\\", "/"), int(label)))
    if not rows:
        raise DatasetError(f"{path} names no image")
    return rows


def class_names(path: Path | None, count: int) -> list[str]:
    """Names of the classes 0 to ``count - 1``: of a list ``0 name``, or the numbers themselves.

    Raises:
        DatasetError: a line without a number, a class without a name, or a name twice.
    """
    if path is None:
        width = len(str(count - 1))
        return [f"{number:0{width}d}" for number in range(count)]
    names: dict[int, str] = {}
    entries = read_entries(path)
    for name, rest, line in zip(entries.names, entries.rests, entries.numbers, strict=True):
        number, _, text = f"{name} {rest}".strip().partition(" ")
        if not number.isdecimal() or not text.strip():
            raise DatasetError(f"{path} line {line}: {name[:80]!r}, expected a number and a name")
        names[int(number)] = text.strip().replace("/", "_").lstrip(".")
    missing = [number for number in range(count) if not names.get(number)]
    if missing:
        raise DatasetError(f"{path} has no name for class {missing[0]}")
    found = [names[number] for number in range(count)]
    if len(set(found)) < count:
        twice = next(name for name in found if found.count(name) > 1)
        raise DatasetError(f"{path} names two classes {twice!r}")
    return found


def lay_out(
    lists: Mapping[str, Path | None], labels: Path | None, root: Path, folder: Path
) -> Path:
    """Class folders of links in ``folder``; in folders of parts where there is more than one list.

    Args:
        lists: by part (``train``, ``val``, ``test``), where there is one.
        labels: names of the classes.
        root: where the paths of the lists start.
        folder: is made anew.

    Raises:
        DatasetError: a line that is wrong, or an image that is not there.
    """
    rows = {part: read_list(path) for part, path in lists.items() if path is not None}
    names = class_names(labels, 1 + max(label for part in rows.values() for _, label in part))
    lost = [(part, name) for part in rows for name, _ in rows[part] if not (root / name).is_file()]
    if lost:
        raise DatasetError(
            f"{len(lost)} images of the lists are not below {root}, the first is {lost[0][1]} of "
            f"{lists[lost[0][0]]}: expected the folder that their paths start from in --data-path"
        )
    shutil.rmtree(folder, ignore_errors=True)
    for part, images in rows.items():
        place = folder / part if len(rows) > 1 else folder
        for name, label in images:
            target = place / names[label] / name.lstrip("/").replace("../", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                _link((root / name).resolve(), target)
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source, target)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(source, target)
