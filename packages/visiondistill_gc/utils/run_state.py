"""The state of a stage on disk: saved often, found again after a kill, exact on a CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn

from shared_core.for_paddle.checkpoints import load_run_state, save_run_state
from shared_core.for_paddle.distributed import World, gather_objects
from shared_core.for_paddle.seeds import capture_rng
from shared_core.runs import StageLog


class Best:
    """The weights with the best accuracy so far; the first of equals stays."""

    def __init__(self) -> None:
        self.accuracy = -1.0  # fraction in [0, 1]; -1: none yet
        self.epoch = -1
        self.weights: dict[str, Any] = {}

    def offer(self, net: nn.Layer, accuracy: float, epoch: int) -> bool:
        """Keep a copy of the weights when ``accuracy`` is higher than before; say whether it is."""
        if not accuracy > self.accuracy:
            return False
        self.keep(net, accuracy, epoch)
        return True

    def keep(self, net: nn.Layer, accuracy: float, epoch: int) -> None:
        """Keep a copy of the weights whatever the accuracy."""
        self.accuracy, self.epoch = float(accuracy), int(epoch)
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"accuracy": self.accuracy, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.accuracy, self.epoch = float(state["accuracy"]), int(state["epoch"])
        self.weights = {k: paddle.to_tensor(v) for k, v in state["weights"].items()}


class StageState:
    """Saves and restores the parts of one stage with its counters, log position and clock."""

    def __init__(self, stage: str, parts: Mapping[str, Any], log: StageLog, world: World) -> None:
        self.path = log.folder / "state" / f"{stage}.pdparams"
        self.parts, self.log, self.world = parts, log, world
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the stage, that of earlier processes up to their last save included."""
        return self._seconds + time.monotonic() - self._since

    def restore(self) -> dict[str, Any] | None:
        """Go on from the saved state: its counters; None when there is none."""
        if not self.path.exists():
            return None
        counters = load_run_state(self.path, self.parts, rank=self.world.rank)
        position, seconds = counters.pop("log_position"), counters.pop("seconds")
        if self.world.is_main:
            self.log.metrics.cut(position)
        self._seconds, self._since = seconds, time.monotonic()
        return counters

    def save(self, **counters: Any) -> None:
        """Write everything; ``counters`` are plain numbers, strings and lists."""
        rng = gather_objects(capture_rng(), self.world)
        if not self.world.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = {"log_position": self.log.metrics.position(), "seconds": self.seconds}
        save_run_state(self.path, self.parts, counters={**counters, **told}, rng=rng)

    def remove(self) -> None:
        """The stage is finished and its result is elsewhere."""
        if self.world.is_main:
            self.path.unlink(missing_ok=True)
