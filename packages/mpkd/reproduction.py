"""The matrix as a command: data and scale, the cells that are left, comparison, record, report."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mpkd.dataset.sources import ARCHIVES, load_data
from mpkd.matrix import PRECISIONS, TEMPERATURES, Matrix, latencies
from mpkd.matrix_report import summary, write_report
from mpkd.pipeline import choose_device, headline
from mpkd.recipes import MATRIX, Setting
from mpkd.run_context import Run
from mpkd.stages import new_net
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.utils.config import load_config
from mpkd.utils.logger import Logger
from shared_core import datasets
from shared_core.for_torch.cost import count_params
from shared_core.for_torch.distributed import start, stop
from shared_core.for_torch.precision import computes_bf16
from shared_core.runs import RunFolder, RunLock, UsageError, write_result
from shared_core.runs.folder import CONFIG_FILE, remove_run

SETS = ("cifar10", "imagenet")
SCALES = ("auto", "full", "short", "rehearsal")
KEYS = ("target", "scale", "seeds", "experiment.seed")
MAY_DIFFER = ("dataset.workers", "dataset.data_dir_cifar10", "dataset.data_dir_imagenet")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Precision x distillation: {fp32, bf16, int8 PTQ, int8 QAT, 4 bits, 2 bits, "
        "mixed 3 bits} x {labels, teacher alone at T = 1, 2, 4}, over seeds.",
    )
    p.add_argument("target", choices=SETS)
    p.add_argument("--data-root", type=Path, default=Path("data"), help="holds CIFAR10, ImageNet")
    p.add_argument("--data-path", type=Path, help="the set's own folder or archive")
    p.add_argument(
        "--scale", choices=SCALES, default="auto",
        help="full; short: about an hour on a CPU; rehearsal: digits; auto: full when the images "
        "are found, else rehearsal",
    )  # fmt: skip
    p.add_argument("--output", type=Path, help="default: runs/mpkd/<set>-<scale>")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--threads", type=int, help="of the CPU (default: the scale's)")
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--emulate-bf16", action="store_true",
        help="train the bf16 row also where the hardware computes no bf16 (several times as "
        "slow); else it is left out there. A rehearsal always has it",
    )  # fmt: skip
    p.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--continue", dest="go_on", action="store_true", help="go on, or start")
    p.add_argument("--fresh", action="store_true", help="delete what --output holds")
    return p


def is_there(target: str, root: Path) -> bool:
    """Whether a data set lies below ``root``."""
    spec = datasets.get("CIFAR-10" if target == "cifar10" else "ImageNet-1k")
    if datasets.find(root, spec) is not None:
        return True
    others = ("cifar-10-batches-py", *ARCHIVES) if target == "cifar10" else ()
    return any((root / name).exists() for name in others)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any], Setting]:
    """The words, the configuration and the sizes.

    Raises:
        UsageError: options that do not go together.
        FileNotFoundError: ``--data-path`` is not there.
    """
    args = build_parser().parse_args(argv)
    if args.fresh and args.go_on:
        raise UsageError("--fresh starts anew, --continue goes on: expected one of them")
    if not args.seeds or len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"--seeds {args.seeds}: expected different ones, from 0")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads is {args.threads}, expected 1 or more")
    if args.data_path is not None and not args.data_path.exists():
        raise FileNotFoundError(f"--data-path {args.data_path}: there is nothing")
    if args.scale == "auto":
        found = args.data_path is not None or is_there(args.target, args.data_root)
        args.scale = "full" if found else "rehearsal"
    if args.scale == "rehearsal" and args.data_path is not None:
        raise UsageError("--scale rehearsal takes the digits: expected no --data-path")
    setting = MATRIX[args.target, args.scale]
    overrides = dict(setting.changes)
    if args.data_path is not None:
        overrides[f"dataset.data_dir_{args.target}"] = str(args.data_path)
        args.data_root = None
    config = load_config(None, args.settings, overrides=overrides)
    if args.output is None:
        args.output = Path("runs") / "mpkd" / f"{args.target}-{args.scale}"
    return args, config, setting


def rows_left_out(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """Precisions that are not tried, with the reason: what the hardware only emulates."""
    if args.emulate_bf16 or args.scale == "rehearsal" or computes_bf16(device):
        return {}
    return {"bf16": "this hardware only emulates it; --emulate-bf16 trains it all the same"}


def run_matrix(argv: Sequence[str] | None) -> int:
    """Parse the command line, do what is left, compare, write. Returns the exit code."""
    args, config, setting = parse(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["packages/mpkd/reproduce.py", *words])
    if args.fresh:
        remove_run(args.output, keys=KEYS)
    world = start(device=choose_device(args.device))
    try:
        if world.world_size > 1:
            raise UsageError("reproduce.py runs in one process: expected it without torchrun")
        threads = args.threads or setting.threads or torch.get_num_threads()
        stored = args.output / CONFIG_FILE
        if args.go_on and stored.exists() and args.threads is None:
            threads = int(json.loads(stored.read_text(encoding="utf-8")).get("threads", threads))
        plain = {
            **config, "target": args.target, "scale": args.scale, "seeds": args.seeds,
            "threads": threads,
        }  # fmt: skip
        RunFolder.create(args.output, plain, resume=args.go_on, may_differ=MAY_DIFFER)
        torch.set_num_threads(threads)
        with RunLock(args.output):
            _go(args, config, world.device, command)
    finally:
        stop()
    return 0


def _go(
    args: argparse.Namespace, config: dict[str, Any], device: torch.device, command: str
) -> None:
    started, begun = datetime.now(timezone.utc), time.monotonic()
    log = Logger(args.output, name=f"{args.target}-{args.scale}")
    data = load_data(config, args.output, data_root=args.data_root)
    line = headline(data, args.scale)
    log.say(line)
    csv = MetricsLogger(args.output / "logs" / f"{log.run_id}.csv", run_id=log.run_id)
    run = Run(config, data, args.output, log, csv, device, scale=args.scale, command=command)
    left_out = rows_left_out(args, device)
    for row, reason in left_out.items():
        log.say(f"{row} is left out: {reason}")
    rows = [precision for precision in PRECISIONS if precision not in left_out]
    work = Matrix(run, seeds=args.seeds, temperatures=TEMPERATURES, precisions=rows)
    work.go()
    if log.done("latency") is None:
        student = f"fp32-labels-{args.seeds[0]}.pth"
        log.finish("latency", {"ms": latencies(run, student), "csv_position": csv.position()})
    inside = {"log_position", "csv_position"}
    cells = {
        name: {k: v for k, v in row.items() if k not in inside}
        for name, row in log.stages.items()
        if " | " in name
    }
    measured: dict[str, Any] = {
        "columns": work.columns,
        "left_out": left_out,
        **summary(cells, work.columns, args.seeds),
        "teacher": {k: v for k, v in log.stages["teacher"].items() if k not in inside},
        "student_parameters": count_params(new_net(run, "student")[0]),
        "ms": log.stages["latency"]["ms"],
        "cells": cells,
    }
    seconds = sum(float(row.get("seconds", 0.0)) for row in log.stages.values())
    record = write_result(
        args.output / "result.json", task=f"mpkd/{args.target}", command=command,
        scale=args.scale, data=data.facts(), seeds=args.seeds, measured=measured,
        started=started, wall_seconds=max(seconds, time.monotonic() - begun),
    )  # fmt: skip
    write_report(args.output, record, cells, line=line, command=command)
    for precision, row in measured["table"].items():
        values = (f"{100 * row[c]['test_accuracy']['mean']:5.1f}" for c in work.columns)
        log.say(f"{precision:>12}: " + "  ".join(values))
    log.say(f"columns: {', '.join(work.columns)}; report: {args.output / 'report.html'}")
    log.say(line)
