"""The chain: prepare, backbone, distil, exits, evaluate; all, one alone, or what is left."""

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

from gfnet_dynn.config import parse
from gfnet_dynn.data_loader_helper import prepare_data
from gfnet_dynn.evaluation import evaluate_run
from gfnet_dynn.model_files import choose_device, choose_precision
from gfnet_dynn.run_log import RunLog
from gfnet_dynn.run_report import headline, write_record, write_report
from gfnet_dynn.stages import Run, distil_student, train_backbone, train_exits
from gfnet_dynn.tracking import Tracker
from shared_core.checkpoints import atomic_write
from shared_core.metrics.floor import floor_accuracy
from shared_core.runs import RunFolder, UsageError
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
)
NOT_IN_CONFIG = ("output", "resume", "go_on", "fresh", "threads_given")
RUN_KEYS = ("scale", "ce_ic_tradeoff", "wanted_data")  # what tells a run of this command
TRACKER_FILE = "mlflow-run.json"


def run_main(argv: Sequence[str] | None, *, prog: str, scale: str | None) -> int:
    """Parse the command line and run what it asks for. Returns the exit code."""
    args = parse(argv, prog=prog, scale=scale)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join([f"packages/gfnet_dynn/{prog}", *words])
    device = choose_device(args.device)
    if args.pin_mem and device.type == "cpu":
        raise UsageError("--pin-mem: page-locked batches are for a GPU, this run is on a CPU")
    if args.fresh:
        remove_run(args.output, keys=RUN_KEYS)
    started = datetime.now(timezone.utc)
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
    torch.set_num_threads(args.threads)
    plain = {key: _plain(value) for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
    folder = RunFolder.create(args.output, plain, resume=resume, may_differ=MAY_DIFFER)
    tracker = _tracker(args, folder)
    failed = True
    try:
        _run_stages(args, plain, folder, tracker, command, started, device)
        failed = False
    finally:
        tracker.close(failed=failed)
    return 0


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
    folder: RunFolder,
    tracker: Tracker,
    command: str,
    started: datetime,
    device: torch.device,
) -> None:
    log = RunLog(folder.path, tracker)
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
    data = prepare_data(args, folder.path)
    run = Run(args, plain, data, log, device, choose_precision(args.amp, device))
    log.say(headline(run))
    for stage in wanted:
        if args.stage not in ("all", stage) and stage != "prepare":
            continue
        if log.done(stage) is not None and not (stage == "evaluate" and args.eval):
            log.say(f"{stage}: done before")
            continue
        _run_stage(stage, run, command, started, clock)
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
        log.finish(
            "prepare", {"floor": floor, "seconds": time.monotonic() - begun, "command": command}
        )
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
        for name in ("result.json", "report.md", "report.html"):
            log.tracker.artifact(run.folder / name)
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
    run.log.say(f"report: {run.folder / 'report.html'}")


def _times(row: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} ms an image ({label})" for label, value in row.items())
