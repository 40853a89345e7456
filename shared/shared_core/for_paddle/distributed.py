"""Data parallel training under paddle.distributed.launch: start, wrap, gather, write once.

The twin of :mod:`shared_core.for_torch.distributed`. On CPUs:
``python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo script.py``.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from shared_core.for_paddle.checkpoints import unwrap

T = TypeVar("T")

__all__ = [
    "World",
    "all_mean",
    "barrier",
    "gather_objects",
    "gather_samples",
    "gather_uneven",
    "main_writes",
    "start",
    "stop",
    "unwrap",
    "wrap",
]


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and where it computes."""

    rank: int
    world_size: int
    device: str

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0


def start(*, device: str = "auto") -> World:
    """Join the other processes that the launcher started, if there are any.

    Args:
        device: ``"auto"`` (a GPU when there is one), ``"cpu"``, or ``"gpu"``, ``"gpu:1"``; ``cuda``
            is another word for ``gpu``.

    Raises:
        ValueError: a GPU that is not there.
    """
    gpus = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    device = ("gpu" if gpus else "cpu") if device == "auto" else device.replace("cuda", "gpu")
    if device.partition(":")[0] not in ("cpu", "gpu"):
        raise ValueError(f"device is {device!r}, expected auto, cpu, gpu or gpu:1")
    if device.startswith("gpu") and not gpus:
        raise ValueError(f"device {device} is not there, expected cpu: this Paddle finds no GPU")
    paddle.device.set_device(device)
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1 and not dist.is_initialized():
        dist.init_parallel_env()
    return World(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    """Leave the other processes; harmless when there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.world_size > 1:
        dist.barrier()


def gather_objects(value: T, world: World) -> list[T]:
    """``value`` of every process in order of rank, in every process.

    The values travel as pickles between processes of one run, never from a file.
    """
    if world.world_size == 1:
        return [value]
    values: list[Any] = []
    dist.all_gather_object(values, value)
    return values


def main_writes(write: Callable[[], T], world: World) -> T:
    """Run ``write`` in the main process only; the others wait, and get its result.

    When it fails, every process raises, so that nobody waits for ever for one that is gone.

    Raises:
        Exception: what ``write`` raised, in the main process.
        RuntimeError: in the others, with the same message.
    """
    result: Any = None
    failure: Exception | None = None
    if world.is_main:
        try:
            result = write()
        except Exception as error:  # the others must hear of it, or they wait for ever
            failure = error
    message = None if failure is None else f"the main process failed: {failure}"
    told = gather_objects((message, result if failure is None else None), world)
    if failure is not None:
        raise failure
    message, result = told[0]
    if message is not None:
        raise RuntimeError(message)
    answer: T = result
    return answer


def gather_uneven(values: Tensor, world: World) -> Tensor:
    """Rows of all processes behind one another, in order of rank; their numbers may differ.

    Args:
        values: shape ``(n, ...)``; ``n`` may be 0, the other axes and the dtype are the same
            everywhere.

    Returns:
        Shape ``(sum of n, ...)``, the same in all processes.
    """
    if world.world_size == 1:
        return values
    counts = gather_objects(int(values.shape[0]), world)
    padded = paddle.zeros([max(counts), *values.shape[1:]], dtype=values.dtype)
    if values.shape[0]:
        padded[: values.shape[0]] = values
    parts: list[Tensor] = []
    dist.all_gather(parts, padded)
    return paddle.concat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_samples(values: Tensor, indices: Tensor, world: World, *, total: int) -> Tensor:
    """Results of an evaluation that was shared out, each sample once, in the data set's order.

    A sample that two processes had (samplers repeat some to fill the last batch) counts once.

    Args:
        values: this process' results, shape ``(n, ...)``.
        indices: which samples they are, int64, shape ``(n,)``, in ``[0, total)``.
        total: number of samples of the data set.

    Returns:
        Shape ``(total, ...)``, row ``i`` belongs to sample ``i``; the same in all processes.

    Raises:
        ValueError: a sample that no process had, or an index out of range.
    """
    if list(indices.shape) != list(values.shape[:1]):
        raise ValueError(
            f"indices have shape {tuple(indices.shape)}, "
            f"expected ({values.shape[0]},) as the values"
        )
    all_values = gather_uneven(values, world).numpy()
    all_indices = gather_uneven(indices, world).numpy()
    if len(all_indices) and not (0 <= all_indices.min() and all_indices.max() < total):
        raise ValueError(f"a sample index is outside 0 to {total - 1}")
    seen = np.zeros(total, dtype=bool)
    seen[all_indices] = True
    if not seen.all():
        raise ValueError(
            f"{int((~seen).sum())} of {total} samples were evaluated by no process, "
            f"the first is number {int(np.flatnonzero(~seen)[0])}"
        )
    ordered = np.empty((total, *all_values.shape[1:]), dtype=all_values.dtype)
    ordered[all_indices] = all_values
    return paddle.to_tensor(ordered)


def all_mean(value: float, world: World, *, weight: float = 1.0) -> float:
    """Mean of a number over the processes, weighted (by samples, say); the same in all."""
    pairs = gather_objects((value, weight), world)
    if len(pairs) == 1:
        return value
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs)


def wrap(model: nn.Layer, world: World, *, unused_parameters: bool = False) -> nn.Layer:
    """The model, averaging its gradients over the processes; itself when there is one process.

    With equal shares of the batch and losses that are batch means, the gradients are those of one
    process on the whole batch. Batch norm still normalises over each process' own share.

    Args:
        model: with the same weights in all processes.
        world: from :func:`start`.
        unused_parameters: True when some steps do not use all parameters.
    """
    if world.world_size == 1:
        return model
    return paddle.DataParallel(model, find_unused_parameters=unused_parameters)
