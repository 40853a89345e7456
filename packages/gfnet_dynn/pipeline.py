"""The chain: prepare, backbone, distil, exits, evaluate; all, one alone, or what is left."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gfnet_dynn.choices import STAGES
from gfnet_dynn.config import Command, parse
from gfnet_dynn.data_loader_helper import prepare_data
from gfnet_dynn.judge.evaluate import evaluate_run, judged_file
from gfnet_dynn.model_files import choose_device, choose_precision
from gfnet_dynn.our_train_helper import train_exits
from gfnet_dynn.report.lines import headline, result_lines, verdicts, with_verdicts
from gfnet_dynn.report.run_page import write_record, write_report
from gfnet_dynn.run import Run
from gfnet_dynn.settings import Settings
from gfnet_dynn.tracking import RunLog, Tracker
from gfnet_dynn.train.networks import distil_student, train_backbone, train_on_labels
from gfnet_dynn.train.parallel import join
from gfnet_dynn.train.teacher import measure_trained_floor
from shared_core.datasets import DatasetError, Manifest, content_key
from shared_core.datasets.splitting.prepared import SPLIT_FILE
from shared_core.for_torch.distributed import World, main_works, main_writes, stop
from shared_core.metrics.floor import floor_accuracy
from shared_core.metrics.trained_floor import NAME
from shared_core.runs import OpenRun, UsageError, open_run
from shared_core.runs.json_files import read_object, write_json
from shared_core.runs.opening import CONFIG_FILE
from shared_core.runs.options import words_of

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = (
    "checkpoint",
    "num_workers",
    "save_every",
    "data_root",
    "data_path",  # the same images may lie elsewhere now: their contents decide
    # Written by earlier versions:
    *("stage", "eval", "pin_mem", "arch", "early_exit_warmup", "wanted_data", "known_set"),
    "use_mlflow",
)
RUN_KEYS = ("scale", "ce_ic_tradeoff", "split_ratio")  # what tells a run of this command
TRACKER_FILE = "mlflow-run.json"
REPORT_FILES = ("result.json", "report.md", "report.html")


def run_main(argv: Sequence[str] | None, *, prog: str, scale: str | None) -> int:
    """Parse the command line and run what it asks for. Returns the exit code."""
    command = parse(argv, prog=prog, scale=scale)
    said = shlex.join([f"packages/gfnet_dynn/{prog}", *words_of(argv)])
    world = join(choose_device(command.device))
    try:
        _check_world(command, world)
        main_writes(lambda: _check_judged(command), world)
        with open_run(
            command.output,
            command.values,
            keys=RUN_KEYS,
            start=command.start,
            may_differ=MAY_DIFFER,
            kept=("threads", "checkpoint"),
            usual={"threads": command.threads or torch.get_num_threads()},
            world=world,
            main_writes=main_writes,
            make_log=RunLog,
        ) as opened:
            torch.set_num_threads(opened.config["threads"])
            main_works(lambda: _check_data(opened), world)
            _track(command, opened, lambda: _run_stages(command, opened, said, world))
    finally:
        stop()
    return 0


def _check_world(command: Command, world: World) -> None:
    """What several processes cannot do."""
    if world.world_size == 1:
        return
    if command.values["classifier_loss"] == "single":
        raise UsageError(
            "--classifier_loss single gives some processes no gradient: expected another one "
            "under torchrun"
        )
    if command.values["barely_train"]:
        raise UsageError("--barely_train is for one process: expected a whole run under torchrun")


def _check_judged(command: Command) -> None:
    """``--eval`` needs a run, or the name of a model."""
    config = command.output / CONFIG_FILE
    if command.only_evaluate and command.judged is None and not config.exists():
        raise FileNotFoundError(
            f"nothing to evaluate: {command.output} holds no run, and no model is named by "
            "--checkpoint-path"
        )


def _check_data(opened: OpenRun) -> None:
    """A resumed run may find its images in another folder; they must be the same images.

    Raises:
        ValueError: images of a folder in place of built-in ones, or the other way round.
        DatasetError: a file whose content is not that of the split.
    """
    if not opened.resumed:
        return
    before, now = opened.stored.get("data_path"), opened.config["data_path"]
    if (before is None) != (now is None):
        raise ValueError(
            f"cannot resume {opened.folder}: it was started on {before or 'built-in scenes'}, "
            f"this command says {now or 'built-in scenes'}"
        )
    split_file = opened.folder / SPLIT_FILE
    if before is None or before == now or not split_file.exists():
        return
    manifest = Manifest.read(split_file, root=now)
    for entry in manifest.entries:
        if content_key(Path(now) / entry.path) != entry.key:
            raise DatasetError(
                f"{Path(now) / entry.path} is another image than the one that the run in "
                f"{opened.folder} began with: expected the images of {before}"
            )


def _track(command: Command, opened: OpenRun, work: Callable[[], None]) -> None:
    """``work`` with its numbers sent to MLflow's run of this folder, if it is wanted."""
    log = opened.log
    if not opened.is_main or not command.use_mlflow or not isinstance(log, RunLog):
        work()
        return
    note = opened.folder / TRACKER_FILE
    known = read_object(note)["run_id"] if note.exists() else None
    values = opened.config
    log.tracker = Tracker(
        _tracking_folder(opened.folder),
        experiment=f"gfnet_dynn-{values['data_set']}",
        run_name=f"{values['ce_ic_tradeoff']}_{values['classifier_loss']}_{values['scale']}",
        run_id=known,
    )
    if log.tracker.run_id and log.tracker.run_id != known:
        write_json(note, {"run_id": log.tracker.run_id})
        log.tracker.parameters(values)
    failed = True
    try:
        work()
        failed = False
    finally:
        log.tracker.close(failed=failed)


def _tracking_folder(output: Path) -> Path:
    """``runs/`` where the run lies below one, so that runs share a store; else beside it."""
    for parent in output.resolve().parents:
        if parent.name == "runs":
            return parent
    return output.resolve().parent


def _run_stages(command: Command, opened: OpenRun, said: str, world: World) -> None:
    settings = Settings.of(opened.config)
    stages = _wanted(settings, command)
    if command.stage != "all":
        _check_stage(command, opened, stages)
        stages = list(dict.fromkeys(["prepare", command.stage]))
    if command.only_evaluate:
        opened.log.stages.pop("evaluate", None)
    seed = settings.seed
    if world.world_size > 1:  # the main process writes the split, the others read it
        main_works(lambda: prepare_data(settings.source, opened.folder, seed=seed) and None, world)
    data = prepare_data(settings.source, opened.folder, seed=seed)
    precision = choose_precision(opened.config["amp"], world.device)
    assert isinstance(opened.log, RunLog)
    run = Run(settings, opened.config, data, opened.log, world.device, precision, world)
    works: dict[str, Callable[[], Mapping[str, Any]]] = {
        "prepare": lambda: main_works(lambda: _prepare(run, said), world),
        "backbone": lambda: train_backbone(run),
        "distil": lambda: distil_student(run),
        "labels": lambda: train_on_labels(run),
        "exits": lambda: train_exits(run),
        "evaluate": lambda: main_works(lambda: _evaluate(run, opened, command, said), world),
    }
    run.log.say(headline(run))
    for stage in stages:
        opened.stage(stage, works[stage], state=opened.folder / "state" / f"{stage}.pth")
    judged = (run.log.done("evaluate") or {}).get("verdicts", [])
    run.log.say(with_verdicts(headline(run), judged))


def _wanted(settings: Settings, command: Command) -> list[str]:
    """The stages that this run is made of."""
    left_out = set()
    if settings.networks.no_distil:
        left_out.add("distil")
    if settings.networks.no_distil or not settings.distillation.compare_labels:
        left_out.add("labels")
    if command.judged is not None:
        left_out |= {"backbone", "distil", "labels", "exits"}
    elif settings.checkpoint is not None:
        left_out |= {"backbone", "distil", "labels"}
    return [stage for stage in STAGES if stage not in left_out]


def _check_stage(command: Command, opened: OpenRun, wanted: Sequence[str]) -> None:
    """A stage alone needs what the stages before it leave behind."""
    stage = command.stage
    if stage not in wanted:
        raise UsageError(f"--stage {stage} has nothing to do here: expected one of {wanted}")
    if command.only_evaluate:
        return
    for before in wanted[1 : wanted.index(stage)]:
        if opened.log.done(before) is None:
            raise UsageError(
                f"--stage {stage} needs the {before} stage first: run --stage {before} with "
                f"--output {opened.folder}, or name a model by --checkpoint-path"
            )


def of_all_stages(command: str) -> str:
    """``command`` without ``--stage``: what makes all that a run's record speaks of."""
    kept: list[str] = []
    for word in shlex.split(command):
        if kept and kept[-1] == "--stage":
            kept.pop()
        elif not word.startswith("--stage="):
            kept.append(word)
    return shlex.join(kept)


def _prepare(run: Run, said: str) -> dict[str, Any]:
    """The floor: what the split gives without a network."""
    train, test = run.data.image_set("train"), run.data.image_set("test")
    floor = floor_accuracy(train.paths, train.labels, test.paths, test.labels)
    run.log.say(run.data.manifest.summary())
    run.log.say(
        f"floor without a network: {floor['plain']:.4f} with plain features, "
        f"{floor['engineered']:.4f} with engineered ones"
    )
    kept: dict[str, Any] = {"floor": floor, "command": of_all_stages(said)}
    if not run.data.rehearsal and (trained := measure_trained_floor(run)):
        kept["trained_floor"] = trained
        run.log.say(f"{NAME} ({trained['network']}): {trained['accuracy']:.4f}")
    return kept


def _evaluate(run: Run, opened: OpenRun, command: Command, said: str) -> dict[str, Any]:
    """Judge, write the record and the report, and say it."""
    prepared = run.log.done("prepare") or {}
    file = judged_file(run, command.judged)
    floors = {name: prepared[name] for name in ("floor", "trained_floor") if name in prepared}
    judgement = evaluate_run(run, file, floors=floors)
    record = write_record(
        run,
        judgement.measured,
        command=prepared.get("command", said),  # of the whole run
        started=opened.started,
        seconds=opened.seconds,
    )
    write_report(run, record, judgement)
    for line in result_lines(judgement.measured):
        run.log.say(line)
    run.log.say(f"report: {run.folder / 'report.html'}")
    if run.log.tracker is not None:
        for path in (*(run.folder / name for name in REPORT_FILES), judgement.file):
            run.log.tracker.artifact(path)
    return {"verdicts": verdicts(judgement.measured, rehearsal=run.data.rehearsal)}
