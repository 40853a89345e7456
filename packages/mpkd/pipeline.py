"""The chain: prepare, teacher, distil, quantize, export, analyze; all or one alone."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mpkd import late_stages, stages
from mpkd.dataset.data_utils import Data
from mpkd.dataset.sources import load_data
from mpkd.recipes import OVERRIDES, SCALES
from mpkd.run_context import STUDENT_FILE, TEACHER_FILE, Run
from mpkd.stages import STAGES, needs_teacher
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import check_mode
from mpkd.trainer.settings import settings_from
from mpkd.utils.config import load_config
from mpkd.utils.logger import Logger, QuietLogger
from shared_core.for_torch.distributed import World, main_writes, start, stop
from shared_core.runs import RunFolder, RunLock, UsageError, write_result
from shared_core.runs.folder import CONFIG_FILE, remove_run
from shared_core.runs.progress import format_seconds

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = (
    "dataset.workers", "dataset.data_dir_cifar10", "dataset.data_dir_imagenet",
    "dataset.data_dir_folder", "dataset.cache.enabled", "dataset.cache.dir",
    "experiment.out_dir", "logging.log_interval",
)  # fmt: skip
RUN_KEYS = ("experiment.seed", "distillation.mode", "quantization.method")
NOT_REPRODUCED = "rehearsal on built-in data: this is not a reproduction of any published number"


def build_parser() -> argparse.ArgumentParser:
    """The command line; everything else is a key of the configuration."""
    p = argparse.ArgumentParser(
        prog="main.py",
        description="Train a teacher, distil a student, give it few bits, export it, draw what "
        "happened: what config.yaml says.",
        epilog="Results go to --output: logs/*.csv, checkpoints/, export/, outputs/, result.json.",
    )
    p.add_argument("--config", type=Path, metavar="FILE", help="YAML with what differs")
    p.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="section.key=value, over the file; may be repeated",
    )  # fmt: skip
    p.add_argument("--stage", default="all", choices=("all", *STAGES), help="one stage, or all")
    p.add_argument(
        "--scale", default="full", choices=SCALES,
        help="full: the configuration as it stands; short: minutes on a CPU; rehearsal: digits",
    )  # fmt: skip
    p.add_argument("--data-root", type=Path, help="folder that holds data sets by name")
    p.add_argument("--output", type=Path, help="run folder (default: out_dir/name)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --output")
    p.add_argument("--continue", dest="go_on", action="store_true", help="go on, or start")
    p.add_argument("--fresh", action="store_true", help="start anew, delete what --output holds")
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The words and the configuration, checked against each other.

    Raises:
        UsageError, FileNotFoundError: see :func:`mpkd.utils.config.load_config`.
    """
    args = build_parser().parse_args(argv)
    if sum((args.resume, args.go_on, args.fresh)) > 1:
        raise UsageError("--resume, --continue and --fresh: expected one of them")
    config = load_config(args.config, args.settings, overrides=OVERRIDES[args.scale])
    if args.scale == "rehearsal" and config["dataset.name"] not in ("digits", "builtin"):
        raise UsageError(
            f"--scale rehearsal: dataset.name is {config['dataset.name']}, expected digits or "
            "builtin"
        )
    check_mode(config)
    mode, method = config["distillation.mode"], config["quantization.method"]
    if mode == "apprentice_c" and method not in ("none", "qat"):
        raise UsageError(
            f"quantization.method is {method}: mode apprentice_c gives its student the bits while "
            "it learns, expected qat or none"
        )
    settings_from(config)  # refuses what contradicts itself
    if args.output is None:
        name = config["experiment.name"]
        if not name or "/" in name or name.startswith("."):
            raise UsageError(f"experiment.name is {name!r}, expected a plain word")
        suffix = "" if args.scale == "full" else f"-{args.scale}"
        args.output = Path(config["experiment.out_dir"]) / f"{name}{suffix}"
    return args, config


def choose_device(name: str) -> str:
    """``auto`` or a device that is there.

    Raises:
        UsageError: another name, or no such GPU.
    """
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        raise UsageError(
            f"experiment.device is {name!r}, expected auto, cpu, cuda, cuda:1"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"experiment.device is {name!r}, expected auto, cpu, cuda, cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"experiment.device is {name!r}: no such GPU here, expected auto or cpu")
    return name


def run_main(argv: Sequence[str] | None) -> int:
    """Parse the command line and run what it asks for. Returns the exit code."""
    args, config = parse(argv)
    command = shlex.join(["packages/mpkd/main.py", *(sys.argv[1:] if argv is None else argv)])
    world = start(device=choose_device(config["experiment.device"]), timeout_s=24 * 3600.0)
    try:
        threads = main_writes(lambda: open_run(args, config), world)
        torch.set_num_threads(threads)
        with RunLock(args.output) if world.is_main else nullcontext():
            run_stages(args, config, world, command)
    finally:
        stop()
    return 0


def open_run(args: argparse.Namespace, config: dict[str, Any]) -> int:
    """Make the run's folder or find it; the number of threads, which is kept with the run."""
    if args.resume and not (args.output / CONFIG_FILE).exists():
        raise FileNotFoundError(f"--resume: nothing to resume in {args.output}")
    if args.fresh:
        remove_run(args.output, keys=RUN_KEYS)
    # Another number of threads rounds differently: a resumed run keeps its own.
    threads = config["experiment.threads"] or torch.get_num_threads()
    stored = args.output / CONFIG_FILE
    goes_on = args.resume or args.go_on
    if goes_on and stored.exists() and not config["experiment.threads"]:
        threads = json.loads(stored.read_text(encoding="utf-8")).get("threads", threads)
    plain = {**config, "scale": args.scale, "threads": threads}
    RunFolder.create(args.output, plain, resume=goes_on, may_differ=MAY_DIFFER)
    return int(threads)


def headline(data: Data, scale: str) -> str:
    """The line that says what was run on what; a run's first and last."""
    facts = data.facts()
    what = (
        f"mpkd, scale {scale}: {facts['name']} ({facts['kind']}), {facts['images']} images, "
        f"{len(data.classes)} classes, {facts['pixels']} px, split {facts['split_hash'][:12]}"
    )
    if data.kind != "built-in":
        return what
    return f"REHEARSAL - {what}. {NOT_REPRODUCED[0].upper()}{NOT_REPRODUCED[1:]}."


def run_stages(
    args: argparse.Namespace, config: dict[str, Any], world: World, command: str
) -> None:
    """Every stage that is asked for and not done yet."""
    started, begun = datetime.now(timezone.utc), time.monotonic()
    name = config["experiment.name"]
    log = Logger(args.output, name=name) if world.is_main else QuietLogger(args.output)
    csv = args.output / "logs" / f"{log.run_id}.csv" if world.is_main else None
    # The main process prepares; the others find everything written.
    data = main_writes(lambda: _Here(load_data(config, args.output, data_root=args.data_root)),
                       world).data  # fmt: skip
    if data is None:
        data = load_data(config, args.output, data_root=args.data_root)
    scale = "rehearsal" if data.kind == "built-in" else args.scale
    run = Run(
        config, data, args.output, log, MetricsLogger(csv, run_id=log.run_id), world.device, world,
        scale, command,
    )  # fmt: skip
    line = headline(data, scale)
    log.say(line)
    stages.check_networks(run)
    wanted = STAGES if args.stage == "all" else (args.stage,)
    for stage in wanted:
        _one(run, stage)
    if "distil" in log.stages and world.is_main:
        seconds = sum(float(one.get("seconds", 0)) for one in log.stages.values())
        _record(run, started, max(seconds, time.monotonic() - begun))
    log.say(line)


class _Here:
    """Data of the main process; what travels to the others is that they must load them."""

    def __init__(self, data: Data | None) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Here, (None,))


NEEDED = {
    "quantize": ("distil", STUDENT_FILE), "export": ("distil", STUDENT_FILE),
    "analyze": ("distil", STUDENT_FILE),
}  # fmt: skip


def _one(run: Run, stage: str) -> None:
    """Run one stage unless it is done."""
    log = run.log
    if log.done(stage) is not None:
        log.say(f"{stage}: done before")
        return
    if stage == "teacher" and not needs_teacher(run.config):
        log.finish(stage, {"skipped": "mode labels has no teacher"})
        return
    if stage == "teacher" and run.config["distillation.mode"] == "apprentice_a":
        log.finish(stage, {"skipped": "apprentice_a trains it beside the student"})
        return
    _check_before(run, stage)
    log.say(f"--- {stage}")
    begun = time.monotonic()
    work: dict[str, Callable[[Run], dict[str, Any]]] = {
        "prepare": lambda r: r.data.facts(), "teacher": stages.teacher_stage,
        "distil": stages.distil_stage, "quantize": late_stages.quantize_stage,
    }  # fmt: skip
    if stage in work:
        result = work[stage](run)
    else:
        later = {"export": late_stages.export_stage, "analyze": late_stages.analyze_stage}[stage]
        result = main_writes(lambda: later(run), run.world)
    result = {"seconds": round(time.monotonic() - begun, 3), **result}
    log.finish(stage, {**result, "csv_position": run.csv.position()})
    log.say(f"{stage}: {format_seconds(time.monotonic() - begun)}")


def _check_before(run: Run, stage: str) -> None:
    if stage == "distil" and needs_teacher(run.config):
        joint = run.config["distillation.mode"] == "apprentice_a"
        if not joint and not run.checkpoint(TEACHER_FILE).is_file():
            raise UsageError(
                f"--stage distil: no teacher in {run.folder}, expected --stage teacher"
            )
    if stage in NEEDED:
        before, file = NEEDED[stage]
        if not run.checkpoint(file).is_file():
            raise UsageError(
                f"--stage {stage}: no student in {run.folder}, expected --stage {before}"
            )


def _record(run: Run, started: datetime, seconds: float) -> None:
    """``result.json``."""
    kept = {
        stage: {k: v for k, v in result.items() if k not in ("log_position", "csv_position")}
        for stage, result in run.log.stages.items()
        if stage in STAGES
    }
    write_result(
        run.folder / "result.json", task=f"mpkd/{run.config['dataset.name']}",
        command=run.command, scale=run.scale, data=run.data.facts(), seeds=[run.seed],
        measured=kept, started=started, wall_seconds=seconds,
    )  # fmt: skip
