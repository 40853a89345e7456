"""The list of files that a data set is to be used without, and why: one line a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from shared_core.checkpoints.atomic import atomic_write
from shared_core.datasets.errors import DatasetError, DatasetNotFoundError

FILE_NAME = "quarantine.txt"  # its conventional place is the data set's own folder


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one, never half of one."""
    # backslashreplace: a file name that is no UTF-8 must not stop the report that names it.
    data = text.encode("utf-8", "backslashreplace")

    def writer(scratch: Path) -> None:
        scratch.write_bytes(data)

    atomic_write(path, writer)


def write_quarantine(path: str | Path, reasons: Mapping[str, str]) -> None:
    """Write ``{path below the data set's folder: reason}``: path, tab, reason; sorted."""
    lines = ["# Files that splits and training leave out: path, tab, reason."]
    for name in sorted(reasons):
        # A name that a plain line cannot hold is written as a JSON string.
        odd = any(c in name for c in "\t\n\r") or name[:1] in ("#", '"') or not name.isprintable()
        shown = json.dumps(name) if odd else name
        lines.append(f"{shown}\t{' '.join(reasons[name].split())}")
    write_text(path, "\n".join(lines) + "\n")


def read_quarantine(path: str | Path) -> dict[str, str]:
    """Read such a list; a line without a tab is a path without a reason.

    Raises:
        DatasetNotFoundError: no such file.
        DatasetError: a line is not understood, or names a path that is not below the folder.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetNotFoundError(f"no quarantine list at {path}")
    reasons: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        name, _, reason = line.partition("\t")
        if name.startswith('"'):
            try:
                name = str(json.loads(name))
            except json.JSONDecodeError:
                raise DatasetError(f"{path} line {number}: {name!r} is no JSON string") from None
        if name.startswith("/") or ".." in name.split("/"):
            raise DatasetError(
                f"{path} line {number}: {name!r} is not a path below the data set's folder"
            )
        reasons[name] = reason
    return reasons


def load_quarantine(
    root: str | Path, quarantine: Mapping[str, str] | str | Path | None
) -> dict[str, str]:
    """The list to honour: the one given, as a mapping or a file; None: ``root/quarantine.txt``.

    Raises:
        DatasetNotFoundError: a file was given and is not there.
    """
    if isinstance(quarantine, Mapping):
        return dict(quarantine)
    if quarantine is not None:
        return read_quarantine(quarantine)
    default = Path(root) / FILE_NAME
    return read_quarantine(default) if default.is_file() else {}
