"""Running cells: those that are left, one after the other, each written down when it is done.

``cells/<name>-s<seed>/`` below the sweep's folder is a cell's own: a process locks it, works in
``run/`` of it, and writes ``cell.json`` last. So a killed sweep goes on with the same command, and
several processes may share a folder: what one is at, the others pass over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shared_core.runs.clock import RunClock
from shared_core.runs.json_files import as_plain, read_object, write_json
from shared_core.runs.lock import RunLock
from shared_core.runs.log import _plain
from shared_core.runs.place import is_durable, remove
from shared_core.runs.progress import format_seconds
from shared_core.trials.cells import Cell, check_cells, groups_of, shard_of
from shared_core.trials.results import Metric, Trials, column

CELLS, WORK, SETTINGS_FILE, CELL_FILE = "cells", "run", "settings.json", "cell.json"
SCHEMA = "smallvision.cell/1"
Measure = Callable[[Cell, Path], Mapping[str, Any]]
Say = Callable[[str], object]


def run_trials(
    cells: Sequence[Cell],
    measure: Measure,
    *,
    folder: str | Path,
    shard: tuple[int, int] = (1, 1),
    merge: Sequence[str | Path] = (),
    show: Metric | None = None,
    say: Say = print,
) -> Trials:
    """Measure every cell of this shard that is not done; read all that are.

    Args:
        cells: what is tried; each comes after those it needs. A stop leaves whole seeds when the
            cells of a seed stand together.
        measure: makes and measures one cell in a folder of its own, which it finds as a killed
            try has left it. Returns numbers and plain JSON.
        folder: of the sweep.
        shard: which part of the cells this process does, ``(1, 4)`` is the first of four.
        merge: further folders of the same sweep, whose finished cells are taken over.
        show: the number that a cell's line tells.
        say: gets the lines.

    Raises:
        ValueError: a kept result was made with other settings; see also :func:`check_cells`.
        FileNotFoundError: a folder to merge is no sweep's.
    """
    check_cells(cells)
    home = Path(folder)
    for other in merge:
        _take_over(cells, Path(other), home)
    known = {(cell.name, cell.seed): cell for cell in cells}
    mine = [cell for cell in shard_of(cells, shard) if _result(home, cell) is None]
    begun, finished = time.monotonic(), 0
    for number, cell in enumerate(mine):
        needs = [known[need, cell.seed] for need in cell.needs]
        if any(_result(home, need) is None for need in needs):
            say(f"{cell.label}: waits for a cell that another process is at")
            continue
        done = _try_cell(cell, measure, home=home, wait=0.0)
        if done is None:
            say(f"{cell.label}: another process is at it")
            continue
        finished += 1
        left = (time.monotonic() - begun) / finished * (len(mine) - number - 1)
        shown = "" if show is None else f" {column([done['result']], show)[0]:.4f}"
        took = f"{format_seconds(done['seconds'])}, {format_seconds(left)} left"
        say(f"{number + 1}/{len(mine)} {cell.label}:{shown} ({took})")
    found = [(cell, _result(home, cell)) for cell in cells]  # other processes' as well
    results = {(cell.name, cell.seed): done["result"] for cell, done in found if done}
    return Trials(tuple(cells), results, sum(done["seconds"] for _, done in found if done))


def run_cell(cell: Cell, measure: Measure, *, folder: str | Path) -> dict[str, Any]:
    """One cell: from its file when it is done, else measured.

    What all cells share (a teacher, say) is a cell, too: the first process makes it, and the
    others wait for it here.

    Returns:
        ``result``, ``seconds`` (wall time, killed tries included) and what the cell is.

    Raises:
        ValueError: it was begun or made with other settings.
    """
    done = None
    while done is None:
        done = _try_cell(cell, measure, home=Path(folder), wait=math.inf)
    return done


def _try_cell(cell: Cell, measure: Measure, *, home: Path, wait: float) -> dict[str, Any] | None:
    """See :func:`run_cell`; None when another process is still at it after ``wait`` seconds."""
    place = home / CELLS / cell.folder_name
    with ExitStack() as stack:
        try:
            stack.enter_context(RunLock(place, wait=wait))
        except ValueError:
            return None
        done = _result(home, cell)
        if done is not None:
            return done
        about = {"name": cell.name, "seed": cell.seed, "settings": as_plain(dict(cell.settings))}
        settings_file = place / SETTINGS_FILE
        if settings_file.exists():
            _check_settings(settings_file, cell)
        else:
            write_json(settings_file, about)
        clock, work = RunClock(place), place / WORK
        try:
            work.mkdir(exist_ok=True)
            result = _plain(dict(measure(cell, work)))
        except Exception:
            if not is_durable(place):  # nothing of worth: the next try may say something else
                remove(place)
            raise
        done = {"schema": SCHEMA, **about, "result": result, "seconds": round(clock.seconds, 3)}
        write_json(place / CELL_FILE, done)
        return done


def _result(home: Path, cell: Cell) -> dict[str, Any] | None:
    """A finished cell's file, checked; None when there is none."""
    file = home / CELLS / cell.folder_name / CELL_FILE
    return _check_settings(file, cell) if file.exists() else None


def _check_settings(file: Path, cell: Cell) -> dict[str, Any]:
    known = read_object(file)
    before, now = known.get("settings", {}), as_plain(dict(cell.settings))
    if (known.get("name"), known.get("seed")) != (cell.name, cell.seed):
        raise ValueError(
            f"{file} holds {known.get('name')!r} with seed {known.get('seed')}, expected "
            f"{cell.name!r} with seed {cell.seed}"
        )
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{file.parent} was made with {key}={before.get(key)!r}, this command says "
                f"{now.get(key)!r}: expected the same settings, or another --output"
            )
    return known


def _take_over(cells: Sequence[Cell], other: Path, home: Path) -> None:
    """Copy finished cells from another folder of the sweep; those that need one another together,
    because a cell's files stay where they are."""
    if not (other / CELLS).is_dir():
        raise FileNotFoundError(f"{other} holds no {CELLS}/, expected a folder of this sweep")
    for group in groups_of(cells):
        theirs = [_result(other, cell) for cell in group]
        if None in theirs or all(_result(home, cell) is not None for cell in group):
            continue
        for cell, done in zip(group, theirs, strict=True):
            place = home / CELLS / cell.folder_name
            with RunLock(place):
                write_json(place / CELL_FILE, done)
