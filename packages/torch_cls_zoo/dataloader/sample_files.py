"""Readable files with one line a sample: a path below the data folder, then numbers.

The form is CSV: a path with a comma or a quote is quoted. Lines that begin with ``#`` say what the
file is; the first of them is JSON. Numbers are written so that they read back unchanged.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.datasets.finding.quarantine import write_text
from shared_core.texts import match_names, plain_path, read_text, say


@dataclass(frozen=True)
class SampleFile:
    """What was read."""

    path: Path
    about: dict[str, Any]  # of the JSON line; empty where there is none
    names: tuple[str, ...]
    values: np.ndarray  # float64 (N, K)


def write_sample_file(
    path: Path, names: Sequence[str], values: np.ndarray, *, about: Mapping[str, Any]
) -> None:
    """Write one line a sample, all or nothing.

    Args:
        path: the file.
        names: paths below the data folder, with "/".
        values: float ``(N, K)``; each number gets the digits that its type needs.
        about: plain JSON for the first line.

    Raises:
        ValueError: other numbers of names and rows, or numbers that are not finite.
    """
    values = np.asarray(values)
    if values.ndim != 2 or len(values) != len(names):
        raise ValueError(f"values have shape {values.shape}, expected ({len(names)}, K)")
    if not np.isfinite(values).all():
        raise ValueError(f"{path.name}: numbers that are not finite, expected probabilities")
    text = io.StringIO()
    text.write("# " + json.dumps(dict(about), sort_keys=True) + "\n")
    writer = csv.writer(text, lineterminator="\n")
    for name, row in zip(names, values, strict=True):
        # A path that begins with "#" would be read as a remark: "./" in front keeps it a path.
        shown = f"./{name}" if name.startswith("#") else name
        writer.writerow([shown, *(_digits(value) for value in row)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def read_sample_file(
    path: Path, *, columns: int | None = None, known: Sequence[str] = ()
) -> SampleFile:
    """Read such a file, with or without lines that begin with ``#``.

    Args:
        columns: how many numbers a line has; None: as many as the first.
        known: paths that it should hold; they decide the encoding where that has to be guessed.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a line that is no path and numbers, another number of columns, a path twice.
    """
    about: dict[str, Any] = {}
    names: list[str] = []
    rows: list[list[float]] = []
    text = read_text(path, known=known)
    if text.note is not None:
        say(f"note: {text.note}", sys.stderr)
    lines = [line + "\n" for line in text.lines()]
    if lines and lines[0].startswith("#"):
        try:
            read = json.loads(lines[0][1:])
            about = read if isinstance(read, dict) else {}
        except json.JSONDecodeError:
            about = {}
    kept = [line if not line.startswith("#") else "\n" for line in lines]
    reader = csv.reader(kept)
    for row in reader:
        if not row:
            continue
        where = f"{path} line {reader.line_num}"
        try:
            numbers = [float(cell) for cell in row[1:]]
        except ValueError:
            raise ValueError(f"{where}: expected a path and numbers, got {row[:4]}") from None
        wanted = columns if columns is not None else (len(rows[0]) if rows else len(numbers))
        if len(numbers) != wanted or not numbers:
            raise ValueError(f"{where}: {len(numbers)} numbers, expected {wanted}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{where}: a number is not finite")
        names.append(plain_path(row[0].strip()))
        rows.append(numbers)
    if not rows:
        raise ValueError(f"{path} has no samples, expected a path and numbers on each line")
    if len(set(names)) != len(names):
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise ValueError(f"{path}: {twice!r} is there twice")
    return SampleFile(path, about, tuple(names), np.asarray(rows, np.float64))


def rows_for(file: SampleFile, wanted: Sequence[str]) -> np.ndarray:
    """For each wanted path the number of its row, -1 where the file has none.

    A path of the file that goes on to the left (written from another working folder) counts as
    the wanted one when it ends in it and no other row does.
    """
    places = {name: row for row, name in enumerate(file.names)}
    exact = {name: places[hit] for name, hit in match_names(wanted, file.names).found.items()}
    depths = {name.count("/") + 1 for name in wanted}
    tails: dict[str, int] = {}
    for row, name in enumerate(file.names):
        pieces = name.split("/")
        for depth in depths:
            if len(pieces) > depth:
                tail = "/".join(pieces[-depth:])
                tails[tail] = row if tail not in tails else -1
    return np.array([exact.get(name, tails.get(name, -1)) for name in wanted], np.int64)


def missing_line(names: Iterable[str], absent: np.ndarray) -> str:
    """How many of the samples are absent, and the first of them."""
    listed = list(names)
    first = listed[int(np.flatnonzero(absent)[0])]
    return f"{int(absent.sum())} of {len(listed)} samples are missing, the first is {first}"


def _digits(value: Any) -> str:
    """The shortest text that reads back as the same number of its own type."""
    return str(value) if isinstance(value, np.floating) else repr(float(value))
