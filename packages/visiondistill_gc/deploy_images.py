"""Which image files are meant: a file, or a folder's images in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared_core.datasets.finding.scan import is_image_name


@dataclass
class Found:
    """What was listed."""

    files: list[Path] = field(default_factory=list)
    bad: list[tuple[Path, str]] = field(default_factory=list)  # could not be listed, and why
    other: list[Path] = field(default_factory=list)  # files in a folder that are named otherwise


def list_images(path: str | Path) -> Found:
    """The images at ``path``: the file itself, whatever its name, or those in and below a folder.

    Folders are walked in the order of their names as bytes; hidden files are passed over.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(path)
    found = Found()
    if path.is_dir():
        _walk(path, found, frozenset())
    elif path.exists():
        found.files.append(path)
    else:
        raise FileNotFoundError(f"{path} does not exist, expected an image file or a folder")
    return found


def _walk(folder: Path, found: Found, above: frozenset[str]) -> None:
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder that holds it
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        found.bad.append((folder, error.strerror or str(error)))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _walk(folder / entry.name, found, above | {real})
        elif is_image_name(entry.name):
            found.files.append(folder / entry.name)
        else:
            found.other.append(folder / entry.name)


def labels_of(root: Path, files: Sequence[Path], class_names: Sequence[str]) -> list[int] | None:
    """Class numbers by the folders that files lie in; None when one lies in no class folder."""
    number = {name: label for label, name in enumerate(class_names)}
    labels = [
        next((number[p] for p in path.relative_to(root).parts[:-1] if p in number), -1)
        for path in files
    ]
    return None if not labels or min(labels) < 0 else labels
