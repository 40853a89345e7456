"""A sweep as a command: data and teacher, the cells that are left, then the record and the page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpkd.dataset.sources import load_data
from mpkd.experiments.bench import FREE, Bench
from mpkd.pipeline import choose_device, headline
from mpkd.utils.logger import Logger
from shared_core.for_torch.distributed import start, stop
from shared_core.runs import OpenRun, UsageError, open_run, write_result
from shared_core.runs.opening import Start
from shared_core.trials import Cell, Trials, run_trials

MAY_DIFFER = tuple(key for key in FREE if key != "experiment.seed")
KEYS = ("trials", "scale", "experiment.seed")


@dataclass(frozen=True)
class SweepOptions:
    """What the command of a sweep is asked for.

    Attributes:
        name: ``matrix`` or ``claims``; tells runs apart.
        task: of the record.
        script: the command, for the record.
        words: of the command line.
        config: values by dotted key, which cells differ from.
        output: the sweep's folder.
        start: how it starts.
        scale: ``full``, ``short`` or ``rehearsal``.
        seeds: of the students; the teacher is one.
        shard, merge: see :func:`shared_core.trials.run_trials`.
        threads: of the CPU; None: those of the first start.
        usual_threads: of the first start; 0 = torch's choice.
        data_root: a folder that holds data sets by name.
        about: what else tells this sweep from others.
    """

    name: str
    task: str
    script: str
    words: tuple[str, ...]
    config: dict[str, Any]
    output: Path
    start: Start
    scale: str
    seeds: tuple[int, ...]
    shard: tuple[int, int]
    merge: tuple[Path, ...]
    threads: int | None
    usual_threads: int
    data_root: Path | None
    about: Mapping[str, Any]


Cells = Callable[[Bench], list[Cell]]
# Bench, what the teacher's cell gave, all results -> what the record says was measured.
Finish = Callable[[Bench, dict[str, Any], Trials], dict[str, Any]]
Page = Callable[[Path, Mapping[str, Any], str], None]  # folder, record, headline


def run_sweep(options: SweepOptions, *, cells: Cells, finish: Finish, page: Page) -> int:
    """Do what is left, compare, write. Returns the exit code."""
    config = options.config
    world = start(device=choose_device(config["experiment.device"]))
    plain = {
        **config, "trials": options.name, "scale": options.scale, "threads": options.threads,
        **options.about,
    }  # fmt: skip
    usual = {"threads": options.usual_threads or torch.get_num_threads()}
    try:
        if world.world_size > 1:
            raise UsageError(f"{options.script} runs in one process: expected no torchrun")
        with open_run(
            options.output, plain, keys=KEYS, start=options.start, may_differ=MAY_DIFFER,
            usual=usual, make_log=partial(Logger, name=options.output.name), shared=True,
        ) as opened:  # fmt: skip
            torch.set_num_threads(opened.config["threads"])
            _sweep(options, opened, world.device, cells, finish, page)
    finally:
        stop()
    return 0


def _sweep(
    options: SweepOptions,
    opened: OpenRun,
    device: torch.device,
    cells: Cells,
    finish: Finish,
    page: Page,
) -> None:
    folder, log = opened.folder, opened.log
    with opened.one_at_a_time():
        data = load_data(options.config, folder, data_root=options.data_root)
    scale = "rehearsal" if data.kind == "built-in" else options.scale
    line = headline(data, scale)
    log.say(line)
    command = shlex.join([f"packages/mpkd/{options.script}", *options.words])
    bench = Bench(options.config, data, folder, log, device, scale, command)
    teacher = bench.make_teacher()
    trials = run_trials(
        cells(bench), bench.measure, folder=folder, shard=options.shard, merge=options.merge,
        show="test_accuracy", say=log.say,
    )  # fmt: skip
    if trials.missing:
        log.say(trials.missing_text)
        return
    measured = finish(bench, teacher, trials)
    record = write_result(
        folder / "result.json", task=options.task, command=command, scale=scale,
        data=data.facts(), seeds=list(options.seeds), measured=measured, started=opened.started,
        wall_seconds=max(trials.seconds, opened.seconds),
    )  # fmt: skip
    page(folder, record, line)
    log.say(f"report: {folder / 'report.html'}")
    log.say(" ".join([line, *measured.get("verdicts", ())]))


def settings_shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for a record, keys in order."""
    return {key: config[key] for key in sorted(config)}
