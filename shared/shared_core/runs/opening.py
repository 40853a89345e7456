"""Opening a run: going on or starting anew, alone or beside other processes, stage by stage.

A run owns a folder. One process works in it at a time, from the first look into it to the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from shared_core.runs.clock import RunClock
from shared_core.runs.lock import RunLock
from shared_core.runs.place import CONFIG_FILE, Place, Start
from shared_core.runs.progress import format_seconds
from shared_core.runs.stage_log import StageLog

__all__ = ["CONFIG_FILE", "OpenRun", "Start", "World", "open_run"]

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
            :mod:`shared_core.trials`). Such a run has no stages, and its cells have the clocks.

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

    place = Place(Path(folder), keys=keys, shared=shared)
    try:
        found, stages = from_main(
            lambda: place.open(config, start, may_differ=may_differ, kept=kept, usual=usual or {})
        )
        log = make_log(place.folder, silent=not is_main)
        log.stages = stages
        clock = RunClock(place.folder, writes=is_main and not (shared and found[2]))
        if not shared:
            log.tick = clock.mark
        yield OpenRun(place.folder, *found, log, is_main, shared, clock, from_main)
        if not shared:
            clock.mark(every=0.0)
    except Exception:
        place.undo()
        raise
    finally:
        place.leave()
