"""The state of a stage on disk: saved often, found again after a kill, exact on a CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared_core.for_torch.checkpoints import Stateful, load_run_state, save_run_state
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


class StageState:
    """Saves and restores the parts of one stage with its counters, log position and clock."""

    def __init__(self, stage: str, parts: Mapping[str, Stateful], log: StageLog) -> None:
        self.path: Path = log.folder / "state" / f"{stage}.pth"
        self.parts, self.log = parts, log
        self.counters: dict[str, Any] = {}
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the stage, that of earlier processes up to their last save included."""
        return self._seconds + time.monotonic() - self._since

    def restore(self) -> bool:
        """Go on from the saved state if there is one; the log is cut back to it."""
        if not self.path.exists():
            return False
        self.counters = load_run_state(self.path, self.parts)
        self.log.metrics.cut(self.counters.pop("log_position"))
        self._seconds, self._since = self.counters.pop("seconds"), time.monotonic()
        return True

    def save(self, **counters: Any) -> None:
        """Write everything; ``counters`` are plain numbers, strings and lists."""
        self.counters = counters
        position = self.log.metrics.position()
        save_run_state(
            self.path,
            self.parts,
            counters={**counters, "log_position": position, "seconds": self.seconds},
        )

    def remove(self) -> None:
        """The stage is finished and its result is elsewhere."""
        self.path.unlink(missing_ok=True)
