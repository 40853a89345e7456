"""Training by several processes under torchrun: results gathered, one process writes.

Every process holds the whole model and has its share of each batch: ``--batch`` and
``--finetune-batch`` are those of one process. Gradients are averaged by torch's own
DistributedDataParallel. All processes run the same stages; the main one alone prepares, evaluates,
prints and writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gfnet_dynn.decide.exit_outputs import ExitLogits
from shared_core.for_torch.checkpoints import load_run_state, save_run_state
from shared_core.for_torch.distributed import World, gather_objects, gather_samples, start
from shared_core.for_torch.run_state import StageState
from shared_core.for_torch.seeds import capture_rng
from shared_core.runs import StageLog

ALONE = World(0, 1, 0, torch.device("cpu"))
PATIENCE_S = 24 * 3600.0  # the others wait while the main process prepares and evaluates


def join(device: torch.device) -> World:
    """The world that torchrun's environment describes; this process alone without one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, 0, device)
    name = device.type if device.type != "cuda" or device.index is None else str(device)
    return start(device=name, timeout_s=PATIENCE_S)


def gather_outputs(outputs: ExitLogits, world: World, *, total: int) -> ExitLogits:
    """The whole split in its order, from shares in which process r has samples r, r + W, ..."""
    if world.world_size == 1:
        return outputs
    indices = torch.arange(world.rank, total, world.world_size)

    def whole(values: np.ndarray) -> np.ndarray:
        shared = torch.from_numpy(np.ascontiguousarray(values)).to(world.device)
        return gather_samples(shared, indices.to(world.device), world, total=total).cpu().numpy()

    return ExitLogits(
        np.ascontiguousarray(whole(outputs.logits.swapaxes(0, 1)).swapaxes(0, 1)),
        whole(outputs.gate_logits),
        whole(outputs.labels),
        outputs.costs,
        outputs.exits,
        outputs.split,
        outputs.split_hash,
    )


class SharedState(StageState):
    """The state of a stage, written by the main process with the random states of all."""

    def __init__(
        self, stage: str, parts: Mapping[str, Any], log: StageLog, world: World = ALONE
    ) -> None:
        super().__init__(stage, parts, log)
        self.world = world

    def restore(self) -> bool:
        """Go on from the saved state if there is one."""
        if self.world.world_size == 1:
            return super().restore()
        if not self.path.exists():
            return False
        self.counters = load_run_state(self.path, self.parts, rank=self.world.rank)
        position = self.counters.pop("log_position")
        if self.world.is_main:
            self.log.metrics.cut(position)
        self._seconds, self._since = self.counters.pop("seconds"), time.monotonic()
        return True

    def save(self, **counters: Any) -> None:
        """Write everything, if this is the main process."""
        if self.world.world_size == 1:
            super().save(**counters)
            return
        rng = gather_objects(capture_rng(), self.world)
        self.counters = counters
        if self.world.is_main:
            position = self.log.metrics.position()
            times = {"log_position": position, "seconds": self.seconds}
            save_run_state(self.path, self.parts, counters={**counters, **times}, rng=rng)
