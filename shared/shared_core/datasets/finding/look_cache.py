"""What a look at each file found, kept between runs: a file that is as it was is not read again.

One small database below the user's cache folder. Where there is none, where it cannot be written or
is damaged, files are looked at anew; nothing is ever an error.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

# What decides the findings: to be raised with any change of decoding, hashes or thumbnails.
VERSION = 1
Stamp = tuple[int, int, int]  # bytes; modified and changed, nanoseconds
Look = tuple[str, bytes]  # the findings as JSON, the thumbnail


def cache_file() -> Path | None:
    """Where looks are kept: below ``SMALLVISION_CACHE``, ``XDG_CACHE_HOME`` or ``HOME/.cache``.

    None where the first is empty, or none is set.
    """
    own = os.environ.get("SMALLVISION_CACHE")
    if own is not None:
        return Path(own) / "looks.sqlite" if own else None
    for name, below in (("XDG_CACHE_HOME", ""), ("HOME", ".cache"), ("LOCALAPPDATA", "")):
        if os.environ.get(name):
            return Path(os.environ[name], below, "smallvision", "looks.sqlite")
    return None


def stamp_of(path: str | Path) -> Stamp | None:
    """What tells a changed file from the same one; None where there is no file."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def read_looks(file: Path | None, paths: Iterable[tuple[str, Stamp]]) -> dict[str, Look]:
    """The looks at those of ``paths`` (absolute) that are as they were."""
    found: dict[str, Look] = {}

    def work(data: sqlite3.Connection) -> None:
        for path, stamp in paths:
            row = data.execute(
                "SELECT stamp, found, thumb FROM looks WHERE path = ?", (os.fsencode(path),)
            ).fetchone()
            if row is not None and row[0] == _stamp_text(stamp):
                found[path] = (str(row[1]), bytes(row[2]))

    if file is not None and file.exists():
        _work(file, work)
    return found


def write_looks(file: Path | None, looks: Iterable[tuple[str, Stamp, Look]]) -> None:
    """Keep looks, in the place of older ones at the same files."""
    rows = [
        (os.fsencode(path), _stamp_text(stamp), found, thumb)
        for path, stamp, (found, thumb) in looks
    ]

    def work(data: sqlite3.Connection) -> None:
        data.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?)", rows)

    if file is not None and rows:
        _work(file, work)


def _stamp_text(stamp: Stamp) -> str:
    return json.dumps([VERSION, *stamp])


def _work(file: Path, work: Callable[[sqlite3.Connection], None]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with closing(sqlite3.connect(file, timeout=2)) as data:
            data.execute("PRAGMA synchronous=OFF")
            data.execute(
                "CREATE TABLE IF NOT EXISTS looks (path BLOB PRIMARY KEY, stamp TEXT, found TEXT, "
                "thumb BLOB) WITHOUT ROWID"
            )
            with data:
                work(data)
    except (sqlite3.Error, OSError):
        return
