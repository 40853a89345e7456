"""Data parallel training under torchrun: start, wrap, gather, write once.

Without torchrun's environment everything here works with one process and does nothing extra, so a
project's loop has no second branch.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared_core.for_torch.checkpoints import unwrap

PATIENCE = timedelta(days=7)  # how long work of the main process may take
T = TypeVar("T")

__all__ = [
    "World",
    "accumulating",
    "all_mean",
    "barrier",
    "gather_objects",
    "gather_samples",
    "gather_uneven",
    "main_works",
    "main_writes",
    "share_buffers",
    "start",
    "stop",
    "together",
    "unwrap",
    "wrap",
]


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and where it computes."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"environment variable {name} is {text!r}, expected a whole number")
    return int(text)


def start(
    *,
    device: str = "auto",
    backend: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    init_method: str | None = None,
    timeout_s: float = 600.0,
) -> World:
    """Join the other processes, if there are any.

    Args:
        device: ``"auto"`` (a GPU when there is one), ``"cpu"``, ``"cuda"``, or ``"cuda:1"``.
        backend: ``"gloo"`` or ``"nccl"``; None takes nccl on GPUs and gloo on CPUs.
        rank: this process' number; None reads torchrun's ``RANK`` (0 when absent).
        world_size: number of processes; None reads ``WORLD_SIZE`` (1 when absent).
        init_method: where to meet, such as ``"tcp://127.0.0.1:29500"``; None reads torchrun's
            ``MASTER_ADDR`` and ``MASTER_PORT``.
        timeout_s: seconds after which a collective operation that somebody misses fails.

    Raises:
        ValueError: a rank outside the world, no meeting place, a GPU that is not there.
    """
    rank = _number(os.environ, "RANK", 0) if rank is None else rank
    world_size = _number(os.environ, "WORLD_SIZE", 1) if world_size is None else world_size
    local_rank = _number(os.environ, "LOCAL_RANK", rank)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda":
        if place.index is None:
            place = torch.device("cuda", local_rank)
        index = place.index or 0
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device {place} is not there, expected one of {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(place)
    if world_size > 1 and not dist.is_initialized():
        if init_method is None and "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"world size is {world_size} and no meeting place is given; start with torchrun "
                "or pass init_method"
            )
        dist.init_process_group(
            backend or ("nccl" if place.type == "cuda" else "gloo"),
            init_method=init_method or "env://",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return World(rank, world_size, local_rank, place)


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
    values: list[Any] = [None] * world.world_size
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
    told = [(message, result if failure is None else None)]
    if world.world_size > 1:
        dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    message, result = told[0]
    if message is not None:
        raise RuntimeError(message)
    answer: T = result
    return answer


def main_works(work: Callable[[], T], world: World) -> T:
    """:func:`main_writes` for what may take hours: the others wait longer than a collective may.

    Looking at every byte of every image is such work, and so is an export. The others wait in a
    group of processes of their own, whose patience is :data:`PATIENCE`.
    """
    if world.world_size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    result: Any = None
    failure: Exception | None = None
    if world.is_main:
        try:
            result = work()
        except Exception as error:  # told below, by the main process to all
            failure = error
    dist.barrier(group=group)
    dist.destroy_process_group(group)

    def tell() -> T:
        if failure is not None:
            raise failure
        answer: T = result
        return answer

    return main_writes(tell, world)


def gather_uneven(values: Tensor, world: World) -> Tensor:
    """Rows of all processes behind one another, in order of rank; their numbers may differ.

    Args:
        values: shape ``(n, ...)``; ``n`` may be 0, the other axes and the dtype are the same
            everywhere.

    Returns:
        Shape ``(sum of n, ...)`` on this process' device, the same in all processes.
    """
    if world.world_size == 1:
        return values
    size = torch.tensor([len(values)], device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(world.world_size)]
    dist.all_gather(sizes, size)
    counts = [int(one) for one in sizes]
    padded = values.new_zeros((max(counts), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


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
    if indices.shape != values.shape[:1]:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)}, expected ({len(values)},) as the values"
        )
    all_values = gather_uneven(values, world)
    all_indices = gather_uneven(indices.to(values.device), world)
    if len(all_indices) and not (0 <= int(all_indices.min()) and int(all_indices.max()) < total):
        raise ValueError(f"a sample index is outside 0 to {total - 1}")
    seen = torch.zeros(total, dtype=torch.bool, device=values.device)
    seen[all_indices] = True
    if not bool(seen.all()):
        first = int((~seen).nonzero()[0])
        raise ValueError(
            f"{int((~seen).sum())} of {total} samples were evaluated by no process, "
            f"the first is number {first}"
        )
    ordered = all_values.new_empty((total, *values.shape[1:]))
    ordered[all_indices] = all_values
    return ordered


def all_mean(value: float, world: World, *, weight: float = 1.0) -> float:
    """Mean of a number over the processes, weighted (by samples, say); the same in all."""
    if world.world_size == 1:
        return value
    # float64 on the CPU under gloo, on the GPU under nccl.
    pair = torch.tensor([value * weight, weight], dtype=torch.float64, device=world.device)
    dist.all_reduce(pair)
    return float(pair[0] / pair[1])


def wrap(model: nn.Module, world: World, *, unused_parameters: bool = False) -> nn.Module:
    """The model, averaging its gradients over the processes; itself when there is one process.

    torch's DistributedDataParallel: gradients travel in buckets while the backward pass still runs,
    and each forward pass starts from the main process' buffers (batch-norm statistics). With equal
    shares of the batch and losses that are batch means, the gradients are those of one process on
    the whole batch. Batch norm still normalises over each process' own share; use
    ``torch.nn.SyncBatchNorm`` on GPUs where that matters. Before an evaluation or a save call
    :func:`share_buffers`: the last step has moved each process' own.

    Args:
        model: already on ``world.device``, as are its inputs; the weights of the main process are
            copied to the others.
        world: from :func:`start`.
        unused_parameters: True when some steps do not use all parameters (early exits).
    """
    if world.world_size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=unused_parameters, gradient_as_bucket_view=True
    )


class _Together(nn.Module):
    """A function of some modules as one module, so that it can be wrapped."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def together(
    function: Callable[..., Any],
    modules: Sequence[nn.Module],
    world: World,
    *,
    unused_parameters: bool = False,
) -> nn.Module:
    """``function`` such that a backward pass from what it gives averages the gradients.

    For losses that call a model, parts of it and helpers as they like: see :func:`wrap`, which this
    does to all of them at once. Call it once a backward pass, and the modules only inside it.

    Args:
        function: from a batch to a tensor, or a tuple, list, dict or dataclass with tensors.
        modules: all that it trains, each at least one parameter that takes a gradient.
        world, unused_parameters: as for :func:`wrap`.
    """
    return wrap(_Together(function, modules), world, unused_parameters=unused_parameters)


def accumulating(wrapped: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Context of one forward and backward pass of a step that gathers gradients of several.

    Args:
        wrapped: of :func:`wrap` or :func:`together`; with one process the context does nothing.
        last: the step's last batch, after which the gradients are averaged; nothing travels before.
    """
    if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = wrapped.no_sync()
    return context


@torch.no_grad()
def share_buffers(module: nn.Module, world: World) -> None:
    """Every process gets the main one's buffers (batch-norm statistics), in one message."""
    buffers = list(unwrap(module).buffers())
    if world.world_size == 1 or not buffers:
        return
    pieces = [buffer.detach().contiguous().reshape(-1).view(torch.uint8) for buffer in buffers]
    flat = torch.cat(pieces)
    dist.broadcast(flat, src=0)
    for buffer, piece in zip(
        buffers, torch.split(flat, [len(piece) for piece in pieces]), strict=True
    ):
        # A copy: a slice may begin where numbers of the buffer's type must not.
        buffer.copy_(piece.clone().view(buffer.dtype).reshape(buffer.shape))
