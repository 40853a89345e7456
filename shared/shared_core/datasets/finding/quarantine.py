"""The list of files that a data set is to be used without, and why: one line a file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from shared_core.checkpoints.atomic import atomic_write
from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.texts import as_utf8, match_names, read_entries

FILE_NAME = "quarantine.txt"  # its conventional place is the data set's own folder


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one, never half of one."""
    # A file name that is no UTF-8 must not stop the report that names it.
    data = as_utf8(text)
    atomic_write(path, lambda scratch: scratch.write_bytes(data))


def write_quarantine(path: str | Path, reasons: Mapping[str, str]) -> None:
    """Write ``{path below the data set's folder: reason}``: path, tab, reason; sorted."""
    lines = ["# Files that splits and training leave out: path, tab, reason."]
    for name in sorted(reasons):
        # A name that a plain line cannot hold is written as a JSON string.
        odd = any(c in name for c in "\t\n\r") or name[:1] in ("#", '"') or not name.isprintable()
        shown = json.dumps(name) if odd else name
        lines.append(f"{shown}\t{' '.join(reasons[name].split())}")
    write_text(path, "\n".join(lines) + "\n")


def read_quarantine(path: str | Path, *, known: Collection[str] = ()) -> dict[str, str]:
    """Read such a list; a line without a tab is a path without a reason.

    Lists of other systems are understood: a byte order mark, CRLF, backslashes, other encodings
    (then ``known``, the paths of the data set, decides which).

    Raises:
        DatasetNotFoundError: no such file.
        DatasetError: a line is not understood, or names a path that is not below the folder.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetNotFoundError(f"no quarantine list at {path}")
    try:
        entries = read_entries(path, known=known)
    except ValueError as error:
        raise DatasetError(str(error)) from None
    for name, number in zip(entries.names, entries.numbers, strict=True):
        plain = name.replace("\\", "/")
        if plain.startswith("/") or ".." in plain.split("/"):
            raise DatasetError(
                f"{path} line {number}: {name!r} is not a path below the data set's folder"
            )
    return dict(zip(entries.names, entries.rests, strict=True))


def honoured(
    reasons: Mapping[str, str], known: Iterable[str], *, where: object
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The list by the data set's own paths, and a line for entries that match no file."""
    matched = match_names(reasons, known)
    note = matched.note(where)
    return (
        {path: reasons[name] for name, path in matched.found.items()},
        () if note is None else (note,),
    )


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
