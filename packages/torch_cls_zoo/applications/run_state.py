"""The whole state of a training on disk: from it a killed run goes on exactly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from shared_core.for_torch.checkpoints import load_run_state, save_run_state
from shared_core.for_torch.distributed import gather_objects
from shared_core.for_torch.seeds import capture_rng
from shared_core.runs import MetricLog
from torch_cls_zoo.applications.learn import Sums
from torch_cls_zoo.applications.session import Session, only_main


class RunState:
    """The whole state of a training on disk: one file, written by the main process."""

    def __init__(self, path: Path, parts: dict[str, Any], log: MetricLog, session: Session) -> None:
        self.path, self.parts, self.log, self.session = path, parts, log, session
        self._seconds, self._since = 0.0, time.monotonic()
        self.unreadable = 0

    @property
    def seconds(self) -> float:
        """Wall time, that of earlier processes up to their last save included."""
        return self._seconds + time.monotonic() - self._since

    def restore(self) -> tuple[int, Sums]:
        """Epoch and its sums to go on with; the start when nothing was saved."""
        if not self.path.exists():
            only_main(self.session.world, lambda: self.log.cut(0) if self.log.position() else None)
            return 0, Sums()
        counters = load_run_state(self.path, self.parts, rank=self.session.world.rank)
        only_main(self.session.world, lambda: self.log.cut(counters["log_position"]))
        self._seconds, self._since = counters["seconds"], time.monotonic()
        self.unreadable = counters["unreadable"]
        sums = Sums(**counters["sums"][self.session.world.rank])
        self.session.say(f"going on at epoch {counters['epoch'] + 1}, batch {sums.batches + 1}")
        return counters["epoch"], sums

    def save(self, epoch: int, sums: Sums, *, unreadable: int | None = None) -> None:
        """Write everything; all processes call this at the same place."""
        world = self.session.world
        rng, all_sums = gather_objects(capture_rng(), world), gather_objects(sums.plain(), world)
        if unreadable is not None:
            self.unreadable = unreadable

        def write() -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            counters = {
                "epoch": epoch,
                "sums": all_sums,
                "log_position": self.log.position(),
                "seconds": self.seconds,
                "unreadable": self.unreadable,
            }
            save_run_state(self.path, self.parts, counters=counters, rng=rng)

        only_main(world, write)
