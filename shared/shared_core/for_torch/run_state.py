"""The state of a stage on disk: saved often, found again after a kill, exact on a CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from shared_core.for_torch.checkpoints import Stateful, load_run_state, save_run_state
from shared_core.for_torch.distributed import World, gather_objects
from shared_core.for_torch.seeds import capture_rng
from shared_core.runs.stage_log import StageLog


class Best:
    """The weights with the best accuracy so far; the first of equals stays."""

    def __init__(self) -> None:
        self.accuracy = -1.0  # fraction in [0, 1]; -1: none yet
        self.epoch = -1
        self.weights: dict[str, Tensor] = {}

    def offer(self, model: nn.Module, accuracy: float, epoch: int) -> bool:
        """Keep a copy of ``model``'s weights when ``accuracy`` is new; say whether it was."""
        if not accuracy > self.accuracy:
            return False
        self.accuracy, self.epoch = float(accuracy), int(epoch)
        self.weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"accuracy": self.accuracy, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.accuracy, self.epoch = state["accuracy"], state["epoch"]
        self.weights = dict(state["weights"])


class Rewindable(Protocol):
    """A file that grows while a stage runs, and is cut back when the stage goes on from before."""

    def position(self) -> int:
        """Bytes written so far."""
        ...

    def cut(self, position: int) -> None:
        """Drop what was written after ``position``."""
        ...


class StageState:
    """Saves and restores the parts of one stage with its counters, logs' positions and clock.

    With several processes the main one writes, with the random states of all; every one restores.

    Args:
        stage: part of the file's name.
        parts: what has a state, by name.
        log: the run's; its numbers are cut back to the state that is restored.
        world: this process among several; None for one alone.
        files: further files that grow with the stage, by name.

    Attributes:
        ends: bytes of each file at the last save or restore.
    """

    def __init__(
        self,
        stage: str,
        parts: Mapping[str, Stateful],
        log: StageLog,
        *,
        world: World | None = None,
        files: Mapping[str, Rewindable] | None = None,
    ) -> None:
        self.path: Path = log.folder / "state" / f"{stage}.pth"
        self.parts, self.log, self.world = parts, log, world
        self.files: dict[str, Rewindable] = {"log": log.metrics, **(files or {})}
        self.counters: dict[str, Any] = {}
        self.ends: dict[str, int] = {}
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def _is_main(self) -> bool:
        return self.world is None or self.world.is_main

    @property
    def seconds(self) -> float:
        """Wall time of the stage, that of earlier processes up to their last save included."""
        return self._seconds + time.monotonic() - self._since

    def restore(self, *, rewind: bool = True) -> bool:
        """Go on from the saved state if there is one; the files are cut back to it.

        Args:
            rewind: False leaves the files as they are: what stands behind was written later, by
                what followed this part of the stage. :meth:`rewind` cuts them.
        """
        if not self.path.exists():
            return False
        rank = 0 if self.world is None else self.world.rank
        self.counters = load_run_state(self.path, self.parts, rank=rank)
        self.ends = {name: self.counters.pop(f"{name}_position") for name in self.files}
        self._seconds, self._since = self.counters.pop("seconds"), time.monotonic()
        if rewind:
            self.rewind()
        return True

    def rewind(self) -> None:
        """Cut the files back to where they ended when this state was saved."""
        if self._is_main:
            for name, end in self.ends.items():
                self.files[name].cut(end)

    def save(self, **counters: Any) -> None:
        """Write everything; ``counters`` are plain numbers, strings and lists."""
        several = self.world is not None and self.world.world_size > 1
        rng = gather_objects(capture_rng(), self.world) if several and self.world else None
        self.counters = counters
        if not self._is_main:
            return
        self.ends = {name: file.position() for name, file in self.files.items()}
        positions = {f"{name}_position": end for name, end in self.ends.items()}
        save_run_state(
            self.path,
            self.parts,
            counters={**counters, **positions, "seconds": self.seconds},
            rng=rng,
        )

    def remove(self) -> None:
        """The stage is finished and its result is elsewhere."""
        if self._is_main:
            self.path.unlink(missing_ok=True)
