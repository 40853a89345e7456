"""The chain: prepare, then teacher and student of each fold, evaluate, compare, report."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from shared_core.datasets import EpochOrder
from shared_core.for_paddle.distributed import World, barrier, main_writes, start, stop
from shared_core.metrics.floor import floor_accuracy
from shared_core.runs import RunFolder, StageLog, UsageError
from shared_core.runs.folder import CONFIG_FILE, remove_run
from shared_core.runs.progress import format_seconds
from visiondistill_gc import plots
from visiondistill_gc.comparisons import ARMS, compare_one, summary
from visiondistill_gc.config import parse
from visiondistill_gc.evaluation import held_out, out_of_fold
from visiondistill_gc.run_context import Run, accuracy
from visiondistill_gc.run_report import headline, teacher_facts, write_record, write_report
from visiondistill_gc.stages import (
    given_teacher,
    stored_teacher,
    train_student,
    train_teacher,
)
from visiondistill_gc.utils.data_utils import prepare, train_view
from visiondistill_gc.utils.precision import LeveledPrecision
from visiondistill_gc.utils.prediction import Outputs
from visiondistill_gc.utils.visual_log import VisualLog

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = ("stage", "num_workers", "save_every", "data_root", "visualdl", "folds")
NOT_IN_CONFIG = ("output", "resume", "go_on", "fresh", "threads_given", "log_dir", "save_dir")
RUN_KEYS = ("scale", "teacher_engine", "n_splits")  # what tells a run of this command


class RankLog(StageLog):
    """A stage log that only the main process writes; the others remember."""

    def __init__(self, folder: Path, *, silent: bool) -> None:
        super().__init__(folder)
        self.silent = silent

    def say(self, text: str) -> None:
        if not self.silent:
            super().say(text)

    def begin(self) -> None:
        if not self.silent:
            super().begin()

    def finish(self, stage: str, result: Any) -> dict[str, Any]:
        if not self.silent:
            return super().finish(stage, result)
        self.stages[stage] = {**result, "log_position": 0}
        return self.stages[stage]


def run_main(argv: Sequence[str] | None, *, prog: str) -> int:
    """Parse the command line and run what it asks for. Returns the exit code."""
    args = parse(argv, prog=prog)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join([f"packages/visiondistill_gc/{prog}", *words])
    world = start(device=args.device)
    try:
        # A level that this machine cannot do is told before anything is written.
        LeveledPrecision(world.device, level=args.amp, dtype=args.amp_dtype)
        log, plain = main_writes(lambda: _open(args, world), world)
        args.threads = plain["threads"]
        log = RankLog(args.output, silent=not world.is_main)
        paddle.base.core.set_num_threads(args.threads)
        if args.batch_size % world.world_size or args.teacher_batch_size % world.world_size:
            raise UsageError(
                f"--batch-size {args.batch_size} and --teacher-batch-size "
                f"{args.teacher_batch_size}: expected multiples of {world.world_size} processes"
            )
        args.batch_size //= world.world_size
        args.teacher_batch_size //= world.world_size
        data = main_writes(lambda: prepare(args, args.output), world)
        run = Run(args, plain, data, log, world)
        log.say(headline(run))
        _stages(run, command)
        log.say(headline(run))
    finally:
        stop()
    return 0


def _open(args: argparse.Namespace, world: World) -> tuple[None, dict[str, Any]]:
    """Make or find the run's folder; its options as they were when it began."""
    if args.fresh:
        remove_run(args.output, keys=RUN_KEYS)
    config_file = args.output / CONFIG_FILE
    exists = config_file.exists()
    if args.resume and not exists:
        raise FileNotFoundError(f"nothing to resume: {args.output} holds no run")
    resume = exists and (args.resume or args.go_on or args.stage != "all")
    stored = json.loads(config_file.read_text(encoding="utf-8")) if resume else {}
    if not args.threads_given:  # the run's own number comes before the recipe's
        args.threads = stored.get("threads", args.threads)
    plain = {k: _plain(v) for k, v in vars(args).items() if k not in NOT_IN_CONFIG}
    plain["world_size"] = world.world_size
    RunFolder.create(args.output, plain, resume=resume, may_differ=MAY_DIFFER)
    return None, plain


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _stages(run: Run, command: str) -> None:
    args, clock = run.args, time.monotonic()
    started = datetime.now(timezone.utc)
    work: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        ("prepare", "prepare", lambda: _prepare_stage(run, command))
    ]
    needs_teacher = args.alpha != 1 and args.teacher_knowledge is None
    for fold in args.folds:
        if needs_teacher:
            teach = given_teacher if args.teacher_weights else train_teacher
            work.append(("folds", f"teacher{fold}", lambda f=fold, t=teach: t(run, f)))
        work.append(("folds", f"fold{fold}", lambda f=fold: train_student(run, f)))
    names = "-".join(map(str, args.folds))
    work.append(("evaluate", f"evaluate{names}", lambda: _evaluate(run)))
    for seed in args.compare_seeds:
        for arm in ARMS:
            name = f"compare-{arm}-{seed}"
            work.append(("compare", name, lambda a=arm, s=seed: compare_one(run, a, s)))
    work.append(
        ("report", f"report{names}", lambda: _report(run, f"evaluate{names}", command, started))
    )
    for group, name, job in work:
        if args.stage not in ("all", group) and group != "prepare":
            continue
        if run.log.done(name) is not None:
            run.log.say(f"{name}: done before")
            continue
        missing = [n for g, n, _ in work if run.log.done(n) is None and g != group][:1]
        if args.stage not in ("all", "prepare", "folds") and missing and group != "prepare":
            order = [n for _, n, _ in work]
            if order.index(missing[0]) < order.index(name):
                raise UsageError(f"--stage {group} needs {missing[0]} first: run --stage all")
        _one(run, name, job, clock)


def _one(run: Run, name: str, job: Callable[[], dict[str, Any]], clock: float) -> None:
    """Run a stage and write down that it is finished; its saved state goes last."""
    log, begun = run.log, time.monotonic()
    state = run.folder / "state" / f"{name}.pdparams"
    if not state.exists():
        log.begin()
    barrier(run.world)
    log.say(f"--- {name}")
    result = dict(job())
    result.pop("state", None)
    result.setdefault("seconds", time.monotonic() - begun)
    log.finish(name, result)
    if run.world.is_main:
        state.unlink(missing_ok=True)
    log.say(
        f"{name}: {format_seconds(time.monotonic() - begun)}, "
        f"{format_seconds(time.monotonic() - clock)} in all"
    )


def _prepare_stage(run: Run, command: str) -> dict[str, Any]:
    """Say what the data are, show augmented images, measure the floor."""
    args, data, begun = run.args, run.data, time.monotonic()
    result: dict[str, Any] = {"command": command}
    sizes = np.bincount(data.folds, minlength=args.n_splits).tolist()
    run.log.say(data.prepared.manifest.summary())
    run.log.say(f"folds of {sizes} images, {data.groups} groups of copies kept together")
    if args.teacher_knowledge is not None and args.alpha != 1:
        result["knowledge"] = _look_at_knowledge(run)
    if not run.world.is_main:
        return result
    view = train_view(args, seed=args.seed)
    order = EpochOrder(len(data.images), seed=args.seed).indices()
    lines = plots.augmentations(data.images, view, order[:6].tolist(), views=6)
    names = [["evaluation", *(f"view {n}" for n in range(6))]] * len(lines)
    plots.sheet(run.folder / "augmentations.png", lines, names)
    visual = VisualLog(run.logs / "data" if args.visualdl else None)
    visual.begin("prepare", run.log)
    for number, line in enumerate(lines):
        visual.image("augmentation", np.concatenate(line, axis=1), step=number)
    visual.close()
    if args.floor:
        held = data.test
        train, test = data.images, held
        if held is None:
            train = data.images.subset(data.train_rows(0))
            test = data.images.subset(data.validation_rows(0))
        floor = floor_accuracy(train.paths, train.labels, test.paths, test.labels)
        run.log.say(
            f"floor without a network: {floor['plain']:.4f} with plain features, "
            f"{floor['engineered']:.4f} with engineered ones"
        )
        result["floor"] = floor
    result["seconds"] = time.monotonic() - begun
    return result


def _look_at_knowledge(run: Run) -> dict[str, Any]:
    """What a store's answers are worth on the images that are learned from.

    Raises:
        ValueError: no better than one answer for all, without ``--allow-untrained-teacher``.
    """
    teacher, images = stored_teacher(run), run.data.images
    logits = teacher.logits(images.keys, 0)
    rows = np.arange(len(images))
    found = accuracy(Outputs(logits, images.labels, rows))
    share = float(np.bincount(images.labels).max() / len(images))
    run.log.say(
        f"stored teacher: accuracy {found:.4f} on all images of the folds, always the commonest "
        f"class {share:.4f}; which images it was trained on is not known here"
    )
    if found <= share and not run.args.allow_untrained_teacher:
        raise ValueError(
            f"--teacher-knowledge {run.args.teacher_knowledge}: its accuracy {found:.4f} is no "
            "better than one answer for all; add --allow-untrained-teacher to use it"
        )
    return {
        "accuracy_on_fold_images": found,
        "teacher_hash": teacher.store.about["teacher_hash"],
        "views": teacher.views or "one answer an image",
        "mixup": "answers of the two images mixed; the teacher did not see the mixture",
        "trained_on": "not known: it may have seen validation images",
    }


def _evaluate(run: Run) -> dict[str, Any]:
    found = main_writes(lambda: {"out_of_fold": out_of_fold(run), "test": held_out(run)}, run.world)
    if found["test"] is None:
        del found["test"]
    return found


def _report(run: Run, evaluated: str, command: str, started: datetime) -> dict[str, Any]:
    stages, args = run.log.stages, run.args
    prepared = stages["prepare"]
    measured: dict[str, Any] = {"teacher": teacher_facts(run)}
    if "floor" in prepared:
        measured["floor"] = prepared["floor"]
    for name in ("out_of_fold", "test"):
        if name in stages[evaluated]:
            measured[name] = stages[evaluated][name]
    measured["parameters"] = stages[f"fold{args.folds[0]}"]["parameters"]
    if args.compare_seeds:
        results = {
            arm: {s: stages[f"compare-{arm}-{s}"]["accuracy"] for s in args.compare_seeds}
            for arm in ARMS
        }
        measured["comparison"] = main_writes(lambda: summary(run, results), run.world)

    def write() -> None:
        seconds = sum(result.get("seconds", 0.0) for result in stages.values())
        record = write_record(
            run,
            measured,
            command=prepared.get("command", command),
            started=started,
            seconds=seconds,
        )
        write_report(run, record)

    main_writes(write, run.world)
    folds = measured["out_of_fold"]["accuracy"]
    deviation = "" if folds["std"] is None else f" +- {folds['std']:.4f}"
    run.log.say(f"folds: accuracy {folds['mean']:.4f}{deviation} over {folds['runs']}")
    if "test" in measured:
        run.log.say(f"ensemble, held out: {measured['test']['ensemble']['accuracy']:.4f}")
    run.log.say(f"report: {run.folder / 'report.html'}")
    return {}
