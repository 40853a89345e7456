"""Opening a run: lock, configuration, going on or starting anew, and leaving nothing behind.

A run owns a folder. One process works in it at a time, from the first look into it to the end:
the lock comes before anything is read, compared or removed. What the run depends on stands in
``config.json``; a resumed run must say the same.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from shared_core.runs.clock import RunClock
from shared_core.runs.command import UsageError
from shared_core.runs.json_files import as_plain, read_object, write_json
from shared_core.runs.lock import LOCK_FILE, RunLock
from shared_core.runs.progress import format_seconds
from shared_core.runs.stage_log import STAGES_FILE, StageLog

CONFIG_FILE = "config.json"
Start = Literal["new", "resume", "continue", "fresh"]
# Files that took long to make: where a failed first run left one, the run stays to be resumed.
DURABLE = (
    "*.pth", "*.pt", "*.pdparams", "*.pdopt", "*.safetensors", "*.onnx", "*.npy", "*.npz",
    "values.bin", "cell.json",
)  # fmt: skip
QUICK_STAGES = ("prepare",)  # finished in a moment: alone they are no reason to keep a run
SHARED_WAIT_S = 10.0  # what another process may take to write the configuration
_LEAVING = ".fresh"  # the configuration of a run that is being removed
T = TypeVar("T")


class World(Protocol):
    """What a run must know of the processes that share it; that of both frameworks fits."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""


MainWrites = Callable[[Callable[[], Any], Any], Any]  # main_writes of for_torch, for_paddle


@dataclass(frozen=True)
class OpenRun:
    """A run that this process may work in.

    Attributes:
        folder: where it lies.
        config: what this process runs with: its command's values, and those that are kept from
            the first start.
        stored: the configuration of the first start; empty for a new run.
        resumed: it was there before.
        log: what it says; silent in all processes but the main one.
        is_main: whether this is the process that writes.
        shared: other commands may work in the folder at the same time.
    """

    folder: Path
    config: dict[str, Any]
    stored: dict[str, Any]
    resumed: bool
    log: StageLog
    is_main: bool
    shared: bool
    _clock: RunClock
    _from_main: Callable[[Callable[[], Any]], Any]

    @property
    def started(self) -> datetime:
        """When the run's first process began, with a time zone."""
        return self._clock.started

    @property
    def seconds(self) -> float:
        """Wall time of the run, that of earlier processes included."""
        return self._clock.seconds

    def mark(self) -> None:
        """Write the wall time down, every few seconds at most; the log's own writes do it, too."""
        self._clock.mark()

    def one_at_a_time(self) -> AbstractContextManager[object]:
        """For what commands that share a run prepare for all (a split, drawn images): the first
        one makes it, the others wait, and find it."""
        return RunLock(self.folder / "preparing", wait=math.inf) if self.shared else nullcontext()

    def stage(
        self, name: str, work: Callable[[], Mapping[str, Any]], *, state: Path | None = None
    ) -> dict[str, Any]:
        """Do a stage unless it is done. All processes call this at the same place.

        Args:
            name: of the stage, in ``stages.json``.
            work: does it, and returns plain JSON for later stages and the record; ``seconds`` is
                added where it has none.
            state: file from which a killed try goes on: while it is there, the stage's lines in
                the log stay; it is removed when the stage is finished.

        Returns:
            What the stage left, the same in all processes: the result of the main one's ``work``,
            and ``log_position``.
        """
        if self.shared:
            raise TypeError(f"stage {name}: a shared run has cells, see shared_core.trials")
        done = self.log.done(name)
        if done is not None:
            self.log.say(f"{name}: done before")
            return done
        if self._from_main(lambda: state is None or not state.exists()):
            self.log.begin()
        self.log.say(f"--- {name}")
        begun = time.monotonic()
        result = dict(work())
        result.setdefault("seconds", round(time.monotonic() - begun, 3))
        kept: dict[str, Any] = self._from_main(lambda: self.log.finish(name, result))
        self.log.stages[name] = kept
        if state is not None and self.is_main:
            state.unlink(missing_ok=True)
        self.log.say(
            f"{name}: {format_seconds(time.monotonic() - begun)}, "
            f"{format_seconds(self.seconds)} in all"
        )
        return kept


@contextmanager
def open_run(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    keys: Collection[str],
    start: Start,
    may_differ: Collection[str] = (),
    kept: Collection[str] = ("threads",),
    usual: Mapping[str, Any] | None = None,
    world: World | None = None,
    main_writes: MainWrites | None = None,
    make_log: Callable[..., StageLog] = StageLog,
    shared: bool = False,
) -> Iterator[OpenRun]:
    """Open a run's folder and hold its lock until the end of the ``with`` block.

    A first run that fails (an exception, not a kill or Ctrl-C) before it has finished a stage or
    saved a checkpoint takes away all it made, so that the corrected command can start.

    Args:
        folder: the run's; its parents are made.
        config: everything that the run depends on: plain JSON and paths.
        keys: keys by which a run of this command is known: nothing else is gone on with, or
            removed.
        start: ``new`` refuses a folder that holds a run; ``resume`` needs one; ``continue`` goes
            on or starts; ``fresh`` removes an earlier run first.
        may_differ: keys that a resumed run may change.
        kept: keys that are None in ``config`` where the command does not say them, and then have
            the value of the first start. A value that the command does say must be that one.
        usual: values of the ``kept`` keys in a run that begins.
        world: this process among several; None for one alone.
        main_writes: the framework's ``main_writes``; needed with several processes.
        make_log: called with the folder and ``silent=``; makes the log of each process.
        shared: several commands may work in the folder at once, each on cells of its own (see
            :mod:`shared_core.trials`). Such a run has no stages and no clock.

    Raises:
        ValueError: another process works in the folder; a resumed run says something else; the
            run there is another command's.
        FileExistsError: ``new``, and the folder holds a run.
        FileNotFoundError: ``resume``, and it holds none.
        UsageError: ``fresh``, and it holds something that is no run of this command.
    """
    several = world is not None and world.world_size > 1
    if several and main_writes is None:
        raise TypeError("open_run with several processes needs main_writes of the framework")
    is_main = world is None or world.is_main

    def from_main(work: Callable[[], T]) -> T:
        return main_writes(work, world) if several and main_writes is not None else work()

    place = _Place(Path(folder), keys=keys, shared=shared)
    try:
        found, stages = from_main(
            lambda: place.open(config, start, may_differ=may_differ, kept=kept, usual=usual or {})
        )
        log = make_log(place.folder, silent=not is_main)
        log.stages = stages
        clock = RunClock(place.folder, writes=is_main and not shared)
        log.tick = clock.mark
        yield OpenRun(place.folder, *found, log, is_main, shared, clock, from_main)
        clock.mark(every=0.0)
    except Exception:
        place.undo()
        raise
    finally:
        place.leave()


class _Place:
    """The folder while it is open, and what was there before."""

    def __init__(self, folder: Path, *, keys: Collection[str], shared: bool) -> None:
        self.folder, self.keys, self.config_file = folder, keys, folder / CONFIG_FILE
        self._may_share = shared
        self._lock: RunLock | None = None
        self._missing: list[Path] = []
        self._before: set[str] | None = None  # of a run that begins here

    def open(
        self,
        config: Mapping[str, Any],
        start: Start,
        *,
        may_differ: Collection[str],
        kept: Collection[str],
        usual: Mapping[str, Any],
    ) -> tuple[tuple[dict[str, Any], dict[str, Any], bool], dict[str, dict[str, Any]]]:
        """Lock, look, compare, write. Returns what an :class:`OpenRun` holds, and the stages."""
        self._enter(alone=not self._may_share or start == "fresh")
        if (self.folder / _LEAVING).exists():  # an earlier --fresh was killed at it
            self._empty()
        stored = self._stored(start)
        known = {**usual, **stored}
        plain: dict[str, Any] = as_plain(dict(config))
        for key in kept:
            if plain.get(key) is None and known.get(key) is not None:
                plain[key] = known[key]
        if stored:
            check_same(self.folder, stored, plain, may_differ=may_differ)
        else:
            self._before = self._names()
            write_json(self.config_file, plain, sort_keys=True)
        stages_file = self.folder / STAGES_FILE
        stages = read_object(stages_file) if stored and stages_file.exists() else {}
        if self._may_share and self._lock is not None:
            self._lock.share()
        return (plain, stored, bool(stored)), stages

    def _enter(self, *, alone: bool) -> None:
        """Make the folder and lock it; not ``alone`` if others have got it going already."""
        self._missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        while self._lock is None:
            try:
                self._lock = RunLock(self.folder).__enter__()
            except ValueError:
                if alone:
                    raise
                self._join()

    def _join(self) -> None:
        lock = RunLock(self.folder, shared=True, wait=SHARED_WAIT_S).__enter__()
        if self.config_file.exists():
            self._lock = lock
        else:  # the first one has failed
            lock.__exit__(None, None, None)

    def _names(self) -> set[str]:
        """Names of what lies in the folder, without our own scratch files."""
        ours = (LOCK_FILE, f".{CONFIG_FILE}.tmp-")
        return {p.name for p in self.folder.iterdir() if not p.name.startswith(ours)}

    def _stored(self, start: Start) -> dict[str, Any]:
        """The configuration to go on with; empty for a run that begins."""
        there = self.config_file.exists()
        if start == "fresh":
            if self._names() and not is_run(self.folder, self.keys):
                raise UsageError(
                    f"--fresh: {self.folder} holds no run, expected one to replace; nothing deleted"
                )
            self._empty()
            return {}
        if start == "resume" and not there:
            raise FileNotFoundError(f"nothing to resume: {self.folder} holds no run")
        if start == "new" and there:
            raise FileExistsError(
                f"{self.folder} already holds a run: add --resume to continue it, "
                "--fresh to replace it, or name another folder"
            )
        if not there:
            return {}
        if not is_run(self.folder, self.keys):
            raise ValueError(
                f"cannot resume {self.folder}: its {CONFIG_FILE} is of another command, "
                f"expected {', '.join(sorted(self.keys))} in it"
            )
        return read_object(self.config_file)

    def _empty(self) -> None:
        """Take away everything but the lock; when it is killed, the next start goes on with it."""
        leaving = self.folder / _LEAVING
        if self.config_file.exists():
            os.replace(self.config_file, leaving)
        for name in self._names() - {_LEAVING}:
            remove(self.folder / name)
        leaving.unlink(missing_ok=True)

    def undo(self) -> None:
        """The run failed: leave nothing of it, if it has just begun and made nothing of worth."""
        if self._lock is None or self._before is None or self._has_durable(self._before):
            return
        if not self._lock.alone():
            return
        for name in sorted(self._names() - self._before, key=lambda name: name == CONFIG_FILE):
            remove(self.folder / name)

    def _has_durable(self, before: set[str]) -> bool:
        stages_file = self.folder / STAGES_FILE
        if stages_file.exists() and read_object(stages_file).keys() - set(QUICK_STAGES):
            return True
        return any(is_durable(self.folder / name) for name in self._names() - before)

    def leave(self) -> None:
        """Open the lock, and remove folders that were made and are empty."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None
            with suppress(OSError):
                for path in self._missing:
                    path.rmdir()


def is_durable(path: Path) -> bool:
    """Whether a file, or one in a folder, took long to make; see :data:`DURABLE`."""
    if path.is_file():
        return any(path.match(pattern) for pattern in DURABLE)
    return any(next(path.rglob(pattern), None) is not None for pattern in DURABLE)


def remove(path: Path) -> None:
    """Take away a file, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_run(folder: Path, keys: Collection[str]) -> bool:
    """Whether a folder holds a run whose configuration has ``keys``."""
    try:
        return set(keys) <= read_object(folder / CONFIG_FILE).keys()
    except (OSError, ValueError):
        return False


def check_same(
    folder: Path,
    stored: Mapping[str, Any],
    plain: Mapping[str, Any],
    *,
    may_differ: Collection[str] = (),
) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        ValueError: a key differs; the first one is named.
    """
    for key in sorted(stored.keys() | plain.keys()):
        if key not in may_differ and stored.get(key) != plain.get(key):
            raise ValueError(
                f"cannot resume {folder}: it was started with {key}={stored.get(key)!r}, "
                f"this command says {plain.get(key)!r}"
            )
