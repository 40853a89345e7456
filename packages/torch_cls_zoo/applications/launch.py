"""How many processes, which number each has and where it computes: torchrun's or our own flags."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from shared_core.for_torch.distributed import World, start, stop
from shared_core.runs import UsageError, run_command
from torch_cls_zoo.config import Config, ProcessSettings

Work = Callable[[Config, World], object]


@dataclass(frozen=True)
class Plan:
    """The processes of this machine."""

    device: str  # "cpu", "cuda" for a GPU each, or one GPU by its number
    local: int  # processes that this machine starts
    first_rank: int
    world_size: int
    torchrun: bool = False  # they were started by torchrun already


def plan_processes(
    asked: ProcessSettings, given: Collection[str], *, gpus: int, env: Mapping[str, str]
) -> Plan:
    """What the flags ask for on a machine with ``gpus`` GPUs.

    ``--nodes N --rank n --gpus g`` gives this machine the ranks ``n g`` to ``n g + g - 1`` of
    ``N g``. ``--gpus 0`` or ``--device cpu`` computes on the CPU.

    Args:
        given: options that stood on the command line.
        env: torchrun's variables, if any.

    Raises:
        UsageError: GPUs that are not there, or flags beside torchrun's own.
    """
    device = _device(asked, gpus)
    if "RANK" in env and "WORLD_SIZE" in env:
        for name in ("gpus", "nodes", "rank", "init_method"):
            if name in given:
                raise UsageError(f"--{name}: torchrun decides this already; leave it out")
        plan = Plan(device, 1, int(env["RANK"]), int(env["WORLD_SIZE"]), True)
    else:
        local = _local(asked, device, gpus)
        if "init_method" in given and local * asked.nodes == 1:
            raise UsageError("--init_method does nothing for one process")
        plan = Plan(device, local, max(asked.rank, 0) * local, local * asked.nodes)
    if asked.sync_bn and (plan.device == "cpu" or plan.world_size == 1):
        raise UsageError(
            f"--sync_bn: expected several processes with a GPU each, got {plan.world_size} on "
            f"{plan.device}"
        )
    return plan


def _device(asked: ProcessSettings, gpus: int) -> str:
    if asked.device == "auto":
        return "cuda" if gpus and asked.gpus != 0 else "cpu"
    kind = asked.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device is {asked.device!r}, expected auto, cpu, cuda or cuda:NUMBER")
    if kind == "cuda" and asked.gpus == 0:
        return "cpu"
    if kind == "cuda" and gpus == 0:
        raise UsageError(f"--device {asked.device}: this machine has no GPU that torch can use")
    return asked.device


def _local(asked: ProcessSettings, device: str, gpus: int) -> int:
    """Processes that this machine starts."""
    wants_cuda = device != "cpu"
    if asked.gpus and not wants_cuda and asked.device == "auto":
        raise UsageError(
            f"--gpus {asked.gpus}: this machine has no GPU; add --no-cuda to run {asked.gpus} "
            "processes on the CPU"
        )
    if wants_cuda and (asked.gpus or 0) > (1 if ":" in device else gpus):
        raise UsageError(
            f"--gpus {asked.gpus}: --device {device} has {1 if ':' in device else gpus}"
        )
    if asked.gpus is not None:
        return max(1, asked.gpus)
    return gpus if device == "cuda" else 1


def launch(config: Config, work: Work) -> int:
    """Run ``work(config, world)`` in all processes of this machine. Returns the exit code."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    plan = plan_processes(config.processes, config.given, gpus=gpus, env=os.environ)
    if plan.torchrun or plan.world_size == 1:
        world = start(device=plan.device)
        return _joined(config, work, world)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_child, args=(config, work, plan, local))
        for local in range(plan.local)
    ]
    for process in processes:
        process.start()
    return _wait(processes)


def _wait(processes: list[multiprocessing.process.BaseProcess]) -> int:
    """Wait for all; when one fails, the others would wait for it for ever, so they are ended."""
    code = 0
    try:
        waiting = list(processes)
        while waiting:
            for process in list(waiting):
                process.join(0.2)
                if process.exitcode is None:
                    continue
                waiting.remove(process)
                if process.exitcode != 0 and code == 0:
                    code = process.exitcode if process.exitcode > 0 else 1
                    for other in waiting:  # give them time to say what is wrong with them
                        other.join(5)
                        other.terminate()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    return code


def _child(config: Config, work: Work, plan: Plan, local: int) -> None:
    os.environ["LOCAL_RANK"] = str(local)

    def main(_argv: object) -> int:
        world = start(
            device=plan.device,
            rank=plan.first_rank + local,
            world_size=plan.world_size,
            init_method=config.processes.init_method,
        )
        return _joined(config, work, world)

    sys.exit(run_command(main))


def _joined(config: Config, work: Work, world: World) -> int:
    """Do the work, and leave the other processes whatever comes."""
    try:
        work(config, world)
    finally:
        stop()
    return 0
