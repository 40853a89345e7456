"""Training by several processes under torchrun: results gathered, one process writes.

Every process holds the whole model and has its share of each batch: ``--batch`` and
``--finetune-batch`` are those of one process. Gradients are averaged by torch's own
DistributedDataParallel. All processes run the same stages; the main one alone prepares, evaluates,
prints and writes.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from gfnet_dynn.decide.exit_outputs import ExitLogits
from shared_core.for_torch.distributed import World, gather_samples, start

ALONE = World(0, 1, 0, torch.device("cpu"))


def join(device: torch.device) -> World:
    """The world that torchrun's environment describes; this process alone without one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, 0, device)
    name = device.type if device.type != "cuda" or device.index is None else str(device)
    return start(device=name)


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
