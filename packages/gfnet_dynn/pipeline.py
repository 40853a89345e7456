"""The chain: prepare, backbone, distil, exits, evaluate; all, one alone, or what is left."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gfnet_dynn.analysis_lines import finding_lines
from gfnet_dynn.config import parse
from gfnet_dynn.data_loader_helper import prepare_data
from gfnet_dynn.evaluation import evaluate_run, evaluated_file
from gfnet_dynn.exit_stage import train_exits
from gfnet_dynn.model_files import choose_device, choose_precision
from gfnet_dynn.parallel import QuietLog, join
from gfnet_dynn.run_log import RunLog
from gfnet_dynn.run_report import headline, write_record, write_report
from gfnet_dynn.stages import Run, distil_student, train_backbone
from gfnet_dynn.tracking import Tracker
from shared_core.checkpoints import atomic_write
from shared_core.datasets import DatasetError, Manifest, content_key
from shared_core.datasets.splitting.prepared import SPLIT_FILE
from shared_core.for_torch.distributed import World, barrier, main_writes, stop
from shared_core.metrics.floor import floor_accuracy
from shared_core.runs import RunFolder, RunLock, UsageError
from shared_core.runs.folder import CONFIG_FILE, remove_run
from shared_core.runs.progress import format_seconds

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = (
    "stage",
    "resume",
    "go_on",
    "fresh",
    "eval",
    "checkpoint",
    "num_workers",
    "pin_mem",
    "output",
    "use_mlflow",
    "save_every",
    "data_root",
    "data_path",  # the same images may lie elsewhere now: their contents decide
    "wanted_data",
)
NOT_IN_CONFIG = ("output", "resume", "go_on", "fresh", "threads_given")
RUN_KEYS = ("scale", "ce_ic_tradeoff", "wanted_data")  # what tells a run of this command
TRACKER_FILE = "mlflow-run.json"
REPORT_FILES = ("result.json", "report.md", "report.html")


def run_main(argv: Sequence[str] | None, *, prog: str, scale: str | None) -> int:
    """Parse the command line and run what it asks for. Returns the exit code."""
    args = parse(argv, prog=prog, scale=scale)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join([f"packages/gfnet_dynn/{prog}", *words])
    device = choose_device(args.device)
    if args.pin_mem and device.type == "cpu":
        raise UsageError("--pin-mem: page-locked batches are for a GPU, this run is on a CPU")
    world = join(device)
    _check_world(args, world)
    try:
        started = datetime.now(timezone.utc)
        # Asked once, of the main process: another one may look when the folder is half made.
        args.threads, checkpoint, plain, before = main_writes(lambda: _open(args), world)
        args.checkpoint = None if checkpoint is None else Path(checkpoint)
        torch.set_num_threads(args.threads)
        lock = RunLock(args.output) if world.is_main else nullcontext()
        with lock:
            main_writes(lambda: _check_moved_data(before, args), world)
            folder = RunFolder(args.output)
            if not world.is_main:
                log: RunLog = QuietLog(folder.path)
                _run_stages(args, plain, log, command, started, world)
                return 0
            tracker = _tracker(args, folder)
            failed = True
            try:
                log = RunLog(folder.path, tracker)
                _run_stages(args, plain, log, command, started, world)
                failed = False
            finally:
                tracker.close(failed=failed)
    finally:
        stop()
    return 0


def _check_world(args: argparse.Namespace, world: World) -> None:
    """What several processes cannot do."""
    if world.world_size == 1:
        return
    if args.classifier_loss == "single":
        raise UsageError(
            "--classifier_loss single gives some processes no gradient: expected another one "
            "under torchrun"
        )
    if args.barely_train:
        raise UsageError("--barely_train is for one process: expected a whole run under torchrun")


def _open(
    args: argparse.Namespace,
) -> tuple[int, str | None, dict[str, Any], str | None]:
    """Make or find the run's folder.

    Returns:
        The number of threads, the model to start from, the configuration, and where the images
        lay when the run began (None: built-in ones, or a new run).
    """
    if args.fresh:
        remove_run(args.output, keys=RUN_KEYS)
    config_file = args.output / CONFIG_FILE
    exists = config_file.exists()
    resume = exists and (bool(args.resume) or args.go_on or args.eval or args.stage != "all")
    if args.resume and not exists:
        raise FileNotFoundError(f"nothing to resume: {args.output} holds no run")
    if args.eval and not exists and args.checkpoint is None:
        raise FileNotFoundError(
            f"nothing to evaluate: {args.output} holds no run, and no model is named by "
            "--checkpoint-path"
        )
    stored = json.loads(config_file.read_text(encoding="utf-8")) if resume else {}
    if stored.get("checkpoint") and args.checkpoint is None and not args.eval:
        args.checkpoint = Path(stored["checkpoint"])  # the model that the run started from
    if not args.threads_given:  # the run's own number comes before the recipe's
        args.threads = stored.get("threads", args.threads)
    args.threads = args.threads or torch.get_num_threads()
    plain = {key: _plain(value) for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
    if stored and (stored.get("data_path") is None) != (args.data_path is None):
        raise ValueError(
            f"cannot resume {args.output}: it was started on "
            f"{stored.get('data_path') or 'built-in scenes'}, this command says "
            f"{args.data_path or 'built-in scenes'}"
        )
    RunFolder.create(args.output, plain, resume=resume, may_differ=MAY_DIFFER)
    checkpoint = None if args.checkpoint is None else str(args.checkpoint)
    return args.threads, checkpoint, plain, stored.get("data_path")


def _check_moved_data(before: str | None, args: argparse.Namespace) -> None:
    """A resumed run may find its images in another folder; they must be the same images.

    Raises:
        DatasetError: a file whose content is not that of the split.
        DatasetNotFoundError: one that is not there.
    """
    split_file = args.output / SPLIT_FILE
    if before is None or not split_file.exists() or args.data_path == Path(before):
        return
    manifest = Manifest.read(split_file, root=args.data_path)
    for entry in manifest.entries:
        if content_key(args.data_path / entry.path) != entry.key:
            raise DatasetError(
                f"{args.data_path / entry.path} is another image than the one that the run in "
                f"{args.output} began with: expected the images of {before}"
            )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _tracker(args: argparse.Namespace, folder: RunFolder) -> Tracker:
    """MLflow's run of this folder, gone on with when the run is resumed."""
    note = folder.file(TRACKER_FILE)
    run_id = json.loads(note.read_text(encoding="utf-8"))["run_id"] if note.exists() else None
    tracker = Tracker(
        _tracking_folder(args.output),
        experiment=f"gfnet_dynn-{args.data_set}",
        run_name=f"{args.ce_ic_tradeoff}_{args.classifier_loss}_{args.scale}",
        enabled=args.use_mlflow,
        run_id=run_id,
    )
    if tracker.run_id and tracker.run_id != run_id:
        text = json.dumps({"run_id": tracker.run_id}) + "\n"
        atomic_write(note, lambda path: path.write_text(text, encoding="utf-8"))
        tracker.parameters({key: value for key, value in vars(args).items()})
    return tracker


def _tracking_folder(output: Path) -> Path:
    """``runs/`` where the run lies below one, so that runs share a store; else beside it."""
    for parent in output.resolve().parents:
        if parent.name == "runs":
            return parent
    return output.resolve().parent


def _run_stages(
    args: argparse.Namespace,
    plain: dict[str, Any],
    log: RunLog,
    command: str,
    started: datetime,
    world: World,
) -> None:
    clock = time.monotonic()
    wanted = ["prepare", "backbone", "distil", "exits", "evaluate"]
    if args.no_distil:
        wanted.remove("distil")
    if args.checkpoint and args.eval:
        wanted = ["prepare", "evaluate"]
    elif args.checkpoint:
        wanted = [stage for stage in wanted if stage not in ("backbone", "distil")]
    if args.stage != "all":
        _check_stage(args, log, wanted)
    if world.world_size > 1:  # the main process writes the split, the others read it
        main_writes(lambda: prepare_data(args, log.folder) and None, world)
    data = prepare_data(args, log.folder)
    device = world.device
    run = Run(args, plain, data, log, device, choose_precision(args.amp, device), world)
    log.say(headline(run))
    for stage in wanted:
        if args.stage not in ("all", stage) and stage != "prepare":
            continue
        if log.done(stage) is not None and not (stage == "evaluate" and args.eval):
            log.say(f"{stage}: done before")
            continue
        if world.is_main or stage not in ("prepare", "evaluate"):
            _run_stage(stage, run, command, started, clock)
        barrier(world)  # the others may need what the main process wrote
    log.say(headline(run))


def _check_stage(args: argparse.Namespace, log: RunLog, wanted: list[str]) -> None:
    """A stage alone needs what the stages before it leave behind."""
    if args.stage not in wanted:
        raise UsageError(f"--stage {args.stage} has nothing to do here: expected one of {wanted}")
    if args.checkpoint or args.eval:
        return
    for before in wanted[1 : wanted.index(args.stage)]:
        if log.done(before) is None:
            raise UsageError(
                f"--stage {args.stage} needs the {before} stage first: run --stage {before} with "
                f"--output {args.output}, or name a model by --checkpoint-path"
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


def _run_stage(stage: str, run: Run, command: str, started: datetime, clock: float) -> None:
    log = run.log
    state = run.folder / "state" / f"{stage}.pth"
    if not state.exists():
        log.begin()
    log.say(f"--- {stage}")
    begun = time.monotonic()
    if stage == "prepare":
        train, test = run.data.image_set("train"), run.data.image_set("test")
        floor = floor_accuracy(train.paths, train.labels, test.paths, test.labels)
        log.say(run.data.manifest.summary())
        log.say(
            f"floor without a network: {floor['plain']:.4f} with plain features, "
            f"{floor['engineered']:.4f} with engineered ones"
        )
        result = {"floor": floor, "seconds": time.monotonic() - begun}
        log.finish("prepare", {**result, "command": of_all_stages(command)})
    elif stage == "backbone":
        train_backbone(run)
    elif stage == "distil":
        distil_student(run)
    elif stage == "exits":
        train_exits(run)
    else:
        floor = (log.done("prepare") or {}).get("floor")
        measured, drawn = evaluate_run(run, floor=floor)
        seconds = sum(result["seconds"] for result in log.stages.values() if "seconds" in result)
        seconds += time.monotonic() - begun
        command = (log.done("prepare") or {}).get("command", command)  # of the whole run
        record = write_record(run, measured, command=command, started=started, seconds=seconds)
        write_report(run, record, drawn)
        _say_result(run, measured)
        for path in (*(run.folder / name for name in REPORT_FILES), evaluated_file(run)):
            log.tracker.artifact(path)
        log.finish("evaluate", {})
    log.say(
        f"{stage}: {format_seconds(time.monotonic() - begun)}, "
        f"{format_seconds(time.monotonic() - clock)} in all"
    )


def _say_result(run: Run, measured: dict[str, Any]) -> None:
    """The numbers of the report in a few lines, and where it lies."""
    for name in ("backbone", "student"):
        if name in measured:
            row = measured[name]
            macs = row["macs"] / 1e6
            run.log.say(
                f"{name}: test accuracy {row['accuracy']:.4f}, {macs:.1f} M MACs, "
                + _times(row["ms_per_image"])
            )
    exits = measured["exits"]
    run.log.say(
        f"with exits, nobody leaves: {exits['final_accuracy']:.4f}, "
        + _times(exits["ms_per_image_without_exits"])
    )
    for name, point in exits["points"].items():
        run.log.say(
            f"with exits, {name}: {point['accuracy']:.4f} at "
            f"{100 * point['macs_fraction']:.1f} % of the MACs, " + _times(point["ms_per_image"])
        )
    timed = exits["ms_per_image_at_exits"]
    for index, row in enumerate(exits["points"]["balanced"]["exits"]):
        here = "nobody" if row["accuracy"] is None else f"{row['accuracy']:.4f} right of them"
        run.log.say(
            f"balanced, {'final head' if row['block'] is None else 'exit ' + str(row['block'])}: "
            f"{100 * row['rate']:.1f} % leave, {here}, {row['accuracy_all']:.4f} right of all, "
            f"ECE {row['ece']:.4f}, {row['macs'] / 1e6:.1f} M MACs, "
            + _times({label: times[index] for label, times in timed.items()})
        )
    for line in finding_lines(exits):
        run.log.say(line)
    run.log.say(f"report: {run.folder / 'report.html'}")


def _times(row: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} ms an image ({label})" for label, value in row.items())
