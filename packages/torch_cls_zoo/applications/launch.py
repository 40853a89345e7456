"""How many processes, which number each has and where it computes: torchrun's or our own flags."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shared_core.for_torch.distributed import World, start, stop
from shared_core.runs import UsageError, run_command

Work = Callable[[argparse.Namespace, World], None]


@dataclass(frozen=True)
class Plan:
    """The processes of this machine."""

    device: str  # "cuda" or "cpu"
    local: int  # processes that this machine starts
    first_rank: int
    world_size: int
    torchrun: bool = False  # they were started by torchrun already


def plan_processes(args: argparse.Namespace, *, gpus: int, env: Mapping[str, str]) -> Plan:
    """What the flags ask for on a machine with ``gpus`` GPUs.

    ``--nodes N --rank n --gpus g`` gives this machine the ranks ``n g`` to ``n g + g - 1`` of
    ``N g``. ``--gpus 0`` or ``--no-cuda`` computes on the CPU.

    Raises:
        UsageError: GPUs that are not there, or flags beside torchrun's own.
    """
    wants_cuda = gpus > 0 if args.cuda is None else args.cuda
    if wants_cuda and args.gpus == 0:
        wants_cuda = False
    if wants_cuda and gpus == 0:
        raise UsageError("--cuda: this machine has no GPU that torch can use; leave it out")
    device = "cuda" if wants_cuda else "cpu"
    if "RANK" in env and "WORLD_SIZE" in env:
        for name in ("gpus", "nodes", "rank", "init_method"):
            if name in args.given:
                raise UsageError(f"--{name}: torchrun decides this already; leave it out")
        return _checked(Plan(device, 1, int(env["RANK"]), int(env["WORLD_SIZE"]), True), args)
    if args.gpus is None:
        local = gpus if wants_cuda else 1
    else:
        local = max(1, args.gpus)
    if args.gpus and not wants_cuda and args.cuda is None:
        raise UsageError(
            f"--gpus {args.gpus}: this machine has no GPU; add --no-cuda to run {args.gpus} "
            "processes on the CPU"
        )
    if wants_cuda and local > gpus:
        raise UsageError(f"--gpus {local}: this machine has {gpus}")
    if "init_method" in args.given and local * args.nodes == 1:
        raise UsageError("--init_method does nothing for one process")
    return _checked(Plan(device, local, max(args.rank, 0) * local, local * args.nodes), args)


def _checked(plan: Plan, args: argparse.Namespace) -> Plan:
    if args.sync_bn and (plan.device != "cuda" or plan.world_size == 1):
        raise UsageError(
            f"--sync_bn: expected several processes with a GPU each, got {plan.world_size} on "
            f"{plan.device}"
        )
    return plan


def launch(args: argparse.Namespace, work: Work) -> int:
    """Run ``work(args, world)`` in all processes of this machine. Returns the exit code."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    plan = plan_processes(args, gpus=gpus, env=os.environ)
    if plan.torchrun or plan.world_size == 1:
        world = start(device=plan.device)
        return _guarded(work, args, world)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_child, args=(args, work, plan, local))
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


def _child(args: argparse.Namespace, work: Work, plan: Plan, local: int) -> None:
    os.environ["LOCAL_RANK"] = str(local)

    def main(_argv: object) -> int:
        world = start(
            device=plan.device,
            rank=plan.first_rank + local,
            world_size=plan.world_size,
            init_method=args.init_method,
        )
        return _guarded(work, args, world)

    sys.exit(run_command(main))


def _guarded(work: Work, args: argparse.Namespace, world: World) -> int:
    """Run; a process that fails only because the main one did is silent."""
    try:
        work(args, world)
    except RuntimeError as error:
        if world.is_main or "the main process failed" not in str(error):
            raise
        return 1
    finally:
        stop()
    return 0
