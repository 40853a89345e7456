"""The trials of the papers' claims as a command: a student for each arm and seed, then the record.

An arm is made by the pipeline's own stages. Each is written down when it is done, so that the same
command goes on after a stop; one that was in the middle of a training goes on within it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpkd import quantization_stage
from mpkd.claim_arms import ARMS, CLAIMS, DECIDED, FP32, arms_of
from mpkd.claim_report import summarise_claims, write_claims_report
from mpkd.dataset.sources import load_data
from mpkd.matrix import LABELS, Matrix, cell_name
from mpkd.pipeline import choose_device, headline
from mpkd.recipes import CLAIMS_CIFAR10, CLAIMS_DIGITS
from mpkd.run_context import Run
from mpkd.stages import distil_stage, new_net, train_student
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import NEEDS_TEACHER
from mpkd.utils.common import load_net
from mpkd.utils.config import load_config
from mpkd.utils.logger import Logger
from shared_core.for_torch.cost import count_params
from shared_core.for_torch.distributed import start, stop
from shared_core.runs import RunFolder, RunLock, StageLog, UsageError, write_result
from shared_core.runs.folder import CONFIG_FILE, remove_run

KEYS = ("claims", "experiment.seed")
MAY_DIFFER = ("dataset.workers", "dataset.data_dir_cifar10", "threads")
INSIDE = {"log_position", "csv_position"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="claims.py",
        description="Try what the papers claim (mixed precision, BRECQ, Apprentice, HAQ, SDQ, "
        "MixQuant, LSQ+), small, over several seeds.",
        epilog="Without a data set: scikit-learn's digits. Writes result.json, report.md and "
        "report.html. Start the same command again to go on after a stop.",
    )
    p.add_argument("--data-root", type=Path, help="folder that holds CIFAR10")
    p.add_argument("--data-path", type=Path, help="CIFAR-10's own folder or archive")
    p.add_argument("--what", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    p.add_argument("--output", type=Path, help="default: runs/mpkd/claims-<set>")
    p.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="a key of config.yaml that no arm decides",
    )  # fmt: skip
    p.add_argument("--fresh", action="store_true", help="delete what --output holds")
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The words and the configuration that arms differ from.

    Raises:
        UsageError: options that do not go together.
        FileNotFoundError: ``--data-path`` or ``--data-root`` is not there.
    """
    args = build_parser().parse_args(argv)
    if not args.seeds or len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"--seeds {args.seeds}: expected different numbers from 0")
    if args.threads < 1:
        raise UsageError(f"--threads is {args.threads}, expected 1 or more")
    if args.data_root is not None and args.data_path is not None:
        raise UsageError("--data-root and --data-path: expected one of them")
    for option, path in (("--data-root", args.data_root), ("--data-path", args.data_path)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option} {path}: there is nothing")
    for text in args.settings:
        key = text.partition("=")[0].strip()
        if key in DECIDED and key != "quantization.epochs":
            raise UsageError(f"--set {text}: the arms of the claims decide {key}, expected another")
    real = args.data_root is not None or args.data_path is not None
    overrides = dict((CLAIMS_CIFAR10 if real else CLAIMS_DIGITS).changes)
    if args.data_path is not None:
        overrides["dataset.data_dir_cifar10"] = str(args.data_path)
    config = load_config(None, args.settings, overrides=overrides)
    args.output = args.output or Path("runs") / "mpkd" / f"claims-{config['dataset.name']}"
    return args, config


class CellLog(StageLog):
    """One cell's numbers and training state in a folder of their own; the run's log speaks."""

    def __init__(self, folder: Path, log: StageLog) -> None:
        super().__init__(folder)
        self._log = log

    def say(self, text: str) -> None:
        """One line for the user."""
        self._log.say(text)


class Trials(Matrix):
    """All arms over one data set and all seeds; every student but fp32's kin starts from fp32's.

    Args:
        run: data, folder, log and the configuration that arms differ from.
        seeds: of the students; the teacher is one.
        arms: names, in order.
    """

    def __init__(self, run: Run, *, seeds: Sequence[int], arms: Sequence[str]) -> None:
        super().__init__(run, seeds=seeds)
        self.arms = list(arms)

    def cells(self) -> list[tuple[str, str, int]]:
        """Arm, what the fp32 student learned from, seed; all of a seed, then the next."""
        return [(arm, LABELS, seed) for seed in self.seeds for arm in self.arms]

    def cell(self, precision: str, column: str, seed: int) -> dict[str, Any]:
        """Make the student of an arm and measure it on the test images."""
        arm = ARMS[precision]
        config = {**self.run.config, **arm.changes, "experiment.seed": seed}
        if isinstance(config["quantization.epochs"], float):  # so many times as long
            config["quantization.epochs"] = int(
                config["quantization.epochs"] * self.run.config["quantization.epochs"]
            )
        if arm.kind == "train":
            config["distillation.mode"] = "labels"
        name = cell_name(precision, column, seed)
        place = self.run.folder / "cells" / "".join(c if c.isalnum() else "-" for c in name)
        if not any((place / "state").glob("*.pth")):  # nothing to go on from
            shutil.rmtree(place, ignore_errors=True)
        log = CellLog(place, self.run.log)
        csv = MetricsLogger(place / "epochs.csv", run_id=place.name)
        run = replace(self._run(config), log=log, csv=csv)
        teacher, digest = self.teacher()
        if arm.kind == "train":
            return self._trained(run, precision, column, seed, teacher, digest)
        needs = config["distillation.mode"] in NEEDS_TEACHER
        own = teacher if needs else None
        if arm.kind == "scratch":
            return self._measure(run, self._from_scratch(run, own, digest), teacher)
        student, _ = load_net(run.checkpoint(self._file(FP32, column, seed)))
        made = quantization_stage.quantize(run, student.to(run.device), own, digest)
        kept = {"mean_bits": made.mean_bits, "w_bits": made.w_bits, "notes": made.notes}
        return {**self._measure(run, made.net, teacher), **kept}

    def _from_scratch(self, run: Run, teacher: nn.Module | None, digest: str) -> nn.Module:
        """A student that has few bits from its first step on."""
        if run.config["distillation.mode"] == "apprentice_a":  # its teacher is its own
            apart = replace(run, folder=run.log.folder)
            distil_stage(apart)
            return load_net(apart.checkpoint("student.pth"))[0].to(run.device)
        run.begin("distil")
        student, _ = new_net(run, "student")
        quantization_stage.lower(run, student)
        train_student(run, "distil", student, teacher, digest)
        return student


def run_claims(argv: Sequence[str] | None) -> int:
    """Parse the command line, make what is missing, compare, write. Returns the exit code."""
    args, config = parse(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["packages/mpkd/claims.py", *map(str, words)])
    if args.fresh:
        remove_run(args.output, keys=KEYS)
    world = start(device=choose_device(args.device))
    try:
        if world.world_size > 1:
            raise UsageError("claims.py runs in one process: expected it without torchrun")
        plan = {**config, "claims": "mpkd", "threads": args.threads}
        there = (args.output / CONFIG_FILE).exists()
        RunFolder.create(args.output, plan, resume=there, may_differ=MAY_DIFFER)
        torch.set_num_threads(args.threads)
        with RunLock(args.output):
            _go(args, config, world.device, command)
    finally:
        stop()
    return 0


def _go(
    args: argparse.Namespace, config: dict[str, Any], device: torch.device, command: str
) -> None:
    started, begun = datetime.now(timezone.utc), time.monotonic()
    log = Logger(args.output, name=args.output.name)
    data = load_data(config, args.output, data_root=args.data_root)
    scale = "rehearsal" if data.kind == "built-in" else "short"
    line = headline(data, scale)
    log.say(line)
    csv = MetricsLogger(args.output / "logs" / f"{log.run_id}.csv", run_id=log.run_id)
    run = Run(config, data, args.output, log, csv, device, scale=scale, command=command)
    work = Trials(run, seeds=args.seeds, arms=arms_of(args.what))
    work.go()
    rows = {
        arm: [log.stages[cell_name(arm, LABELS, seed)] for seed in args.seeds] for arm in work.arms
    }
    teacher = {k: v for k, v in log.stages["teacher"].items() if k not in INSIDE}
    measured = {
        **summarise_claims(rows, args.what),
        "teacher": teacher,
        "student_parameters": count_params(new_net(run, "student")[0]),
        "settings": {key: config[key] for key in sorted(config)},
    }
    done = [log.stages["teacher"], *(row for found in rows.values() for row in found)]
    record = write_result(
        args.output / "result.json", task=f"mpkd/{config['dataset.name']}-claims",
        command=command, scale=scale, data=data.facts(), seeds=args.seeds, measured=measured,
        started=started,
        wall_seconds=max(time.monotonic() - begun, sum(float(r["seconds"]) for r in done)),
    )  # fmt: skip
    write_claims_report(args.output, record, line=line)
    for name, claim in measured["claims"].items():
        log.say(f"{name}: {claim['text']}")
    log.say(f"report: {args.output / 'report.html'}")
    log.say(line)
