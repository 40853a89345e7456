"""The chain: prepare, teacher, distil, quantize, export, analyze; all or one alone."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mpkd import few_bits, stages
from mpkd.analysis.verdicts import floors_of, verdicts
from mpkd.dataset.data_utils import TEST, Data
from mpkd.dataset.sources import load_data
from mpkd.deploy.export import ExportData, export_lines, export_student, export_wishes
from mpkd.options import STAGES, MainOptions
from mpkd.run_context import PACKED_FILE, QUANTIZED_FILE, STUDENT_FILE, TEACHER_FILE, Run
from mpkd.starting import plain_floor
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.utils.common import load_net
from mpkd.utils.logger import Logger
from shared_core.for_torch.distributed import World, main_writes, start, stop
from shared_core.runs import OpenRun, UsageError, open_run, write_result
from shared_core.runs.progress import format_seconds

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = (
    "dataset.workers", "dataset.data_dir_cifar10", "dataset.data_dir_imagenet",
    "dataset.data_dir_folder", "dataset.cache.enabled", "dataset.cache.dir",
    "experiment.out_dir", "logging.log_interval",
)  # fmt: skip
RUN_KEYS = ("experiment.seed", "distillation.mode", "quantization.method")
NOT_REPRODUCED = "rehearsal on built-in data: this is not a reproduction of any published number"
NEEDED = {"quantize": "distil", "export": "distil", "analyze": "distil"}


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


def run_main(options: MainOptions, words: Sequence[str]) -> int:
    """Run what the command line asks for. Returns the exit code."""
    config = options.config
    command = shlex.join(["packages/mpkd/main.py", *words])
    world = start(device=choose_device(config["experiment.device"]), timeout_s=24 * 3600.0)
    # Another number of threads rounds differently: a resumed run keeps its own.
    plain = {**config, "scale": options.scale, "threads": config["experiment.threads"] or None}
    try:
        with open_run(
            options.output, plain, keys=RUN_KEYS, start=options.start, may_differ=MAY_DIFFER,
            usual={"threads": torch.get_num_threads()}, world=world, main_writes=main_writes,
            make_log=partial(Logger, name=config["experiment.name"]),
        ) as opened:  # fmt: skip
            torch.set_num_threads(opened.config["threads"])
            run_stages(opened, options, world, command)
    finally:
        stop()
    return 0


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


def run_stages(opened: OpenRun, options: MainOptions, world: World, command: str) -> None:
    """Every stage that is asked for and not done yet."""
    config, folder, log = options.config, opened.folder, opened.log
    csv = folder / "logs" / f"{log.run_id}.csv" if world.is_main else None
    data = load_together(lambda: load_data(config, folder, data_root=options.data_root), world)
    run = Run(
        config=config, data=data, folder=folder, log=log,
        csv=MetricsLogger(csv, run_id=log.run_id), device=world.device, world=world,
        scale="rehearsal" if data.kind == "built-in" else options.scale, command=command,
    )  # fmt: skip
    line = headline(data, run.scale)
    log.say(line)
    stages.check_networks(run)
    for stage in options.stages:
        do_stage(run, stage)
    if "distil" in log.stages and world.is_main:
        _record(run, opened)
    log.say(" ".join([line, *verdicts(log.stages)]))


class _Here:
    """Data of the main process; what travels to the others is that they must load them."""

    def __init__(self, data: Data | None) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Here, (None,))


def load_together(load: Callable[[], Data], world: World) -> Data:
    """The main process prepares the images; the others find everything written."""
    data = main_writes(lambda: _Here(load()), world).data
    return load() if data is None else data


def do_stage(run: Run, stage: str) -> None:
    """Do one stage unless it is done."""
    log = run.log
    if log.done(stage) is not None:
        log.say(f"{stage}: done before")
        return
    _check_before(run, stage)
    log.say(f"--- {stage}")
    begun = time.monotonic()
    work: dict[str, Callable[[Run], dict[str, Any]]] = {
        "prepare": lambda r: r.data.facts(), "teacher": stages.teacher_stage,
        "distil": stages.distil_stage,
        "quantize": partial(few_bits.quantize_stage, load_teacher=stages.load_teacher),
        "export": lambda r: r.from_main(lambda: export_stage(r)),
        "analyze": lambda r: r.from_main(lambda: analyze_stage(r)),
    }  # fmt: skip
    result = work[stage](run)
    result = {"seconds": round(time.monotonic() - begun, 3), **result}
    log.finish(stage, {**result, "csv_position": run.csv.position()})
    log.say(f"{stage}: {format_seconds(time.monotonic() - begun)}")


def export_stage(run: Run) -> dict[str, Any]:
    """Write the student that was measured last as the model folder ``export/``."""
    wishes = export_wishes(run.config)
    if not wishes.any:
        return {"files": {}}
    quantized = run.checkpoint(QUANTIZED_FILE)
    file = quantized if quantized.is_file() else run.checkpoint(STUDENT_FILE)
    student, known = load_net(file)
    has_bits, packed = bool(known.get("quantization")), run.checkpoint(PACKED_FILE)
    loader = run.evaluation_loader(TEST, shared=False).loader
    written = export_student(
        run.folder / "export", student, known, wishes,
        ExportData(((b.images, b.labels) for b in loader), run.calibration_pixels()),
        packed=packed if has_bits and packed.is_file() else None, command=run.command,
    )  # fmt: skip
    for line in export_lines(written, wishes, has_bits=has_bits):
        run.log.say(f"export: {line}")
    kept = ("default", "files", "costs", "measured")
    return {"folder": "export", **{name: written.facts.as_dict()[name] for name in kept}}


def analyze_stage(run: Run) -> dict[str, Any]:
    """Measure the floor, draw the curves of the run's CSV into ``outputs/``, write the report."""
    from mpkd.analysis.analysis import write_report

    if run.log.done("floor") is None:
        run.log.finish("floor", {"floor": plain_floor(run)})
    pages = write_report([run.folder], run.folder / "outputs")
    return {"report": [page.name for page in pages]}


def _check_before(run: Run, stage: str) -> None:
    """Refuse a stage whose input is missing."""
    file, expected = STUDENT_FILE, NEEDED.get(stage)
    if stage == "distil" and few_bits.needs_teacher(run.config):
        if run.config["distillation.mode"] != "apprentice_a":
            file, expected = TEACHER_FILE, "teacher"
    if expected is not None and not run.checkpoint(file).is_file():
        what = "teacher" if expected == "teacher" else "student"
        raise UsageError(f"--stage {stage}: no {what} in {run.folder}, expected --stage {expected}")


def _record(run: Run, opened: OpenRun) -> None:
    """``result.json``."""
    kept: dict[str, Any] = {
        stage: {k: v for k, v in result.items() if k not in ("log_position", "csv_position")}
        for stage, result in run.log.stages.items()
        if stage in STAGES
    }
    kept["floors"], kept["verdicts"] = floors_of(run.log.stages), verdicts(run.log.stages)
    write_result(
        run.folder / "result.json", task=f"mpkd/{run.config['dataset.name']}",
        command=run.command, scale=run.scale, data=run.data.facts(), seeds=[run.seed],
        measured=kept, started=opened.started, wall_seconds=opened.seconds,
    )  # fmt: skip
