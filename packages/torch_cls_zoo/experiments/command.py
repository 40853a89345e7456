"""The command of the experiments: which cells are left, run them, write the record and the page."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.metrics.trained_floor import NAME
from shared_core.runs import OpenRun, UsageError, open_run, write_result
from shared_core.runs.opening import Start
from shared_core.runs.progress import format_seconds
from shared_core.trials import Cell, Trials, run_cell, run_trials
from torch_cls_zoo.applications.floor import measure_floors
from torch_cls_zoo.experiments.cells import Bench, cells_of
from torch_cls_zoo.experiments.data import find_data, open_images
from torch_cls_zoo.experiments.page import Page, summarize_rows, verdicts, write_page
from torch_cls_zoo.experiments.recipes import Recipe, recipe
from torch_cls_zoo.experiments.rows import EXPERIMENTS, Row

RUN_KEYS = {"trials", "experiment", "recipe"}  # tell our runs by


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        scale: ``auto``, ``full``, ``short`` or ``rehearsal``.
        rows: names of rows; None for all.
        command: for the record.
    """

    experiment: str
    data_root: Path | None
    data_path: Path | None
    scale: str
    rows: list[str] | None
    output: Path | None
    init: str
    threads: int | None
    workers: int | None
    seeds: list[int]
    shard: tuple[int, int]
    merge: list[Path]
    start: Start
    command: Sequence[str]


def reproduce(asked: Asked) -> int:
    """Run what is asked for. Returns the exit code."""
    clock = time.monotonic()
    rows = chosen_rows(asked.experiment, asked.rows)
    scale, folder = found_images(asked)
    settings = recipe(scale, asked.experiment)
    output = asked.output or Path("runs") / "torch_cls_zoo" / f"{asked.experiment}-{scale}"
    config = {
        "trials": "torch_cls_zoo",
        "experiment": asked.experiment,
        "scale": scale,
        "data": folder,
        "init": asked.init,
        "recipe": asdict(settings),
    }
    with open_run(output, config, keys=RUN_KEYS, start=asked.start, shared=True) as run:
        headline = headline_of(asked.experiment, scale, folder, settings)
        run.log.say(headline)
        with run.one_at_a_time():
            data = open_images(folder, output, known=asked.data_path is None, settings=settings)
        run.log.say(data.manifest.summary())
        reasons = {row.name: row.reason(scale, asked.init) for row in rows}
        trials = _run_cells(asked, run, rows, reasons, settings, data)
        if trials.missing:
            run.log.say(trials.missing_text)
            return 0
        floors = _floors(run, data, settings)
        models = _models(run, rows, scale) if asked.experiment == "models" else []
        table = summarize_rows(rows, trials, reasons)
        measured: dict[str, Any] = {"floor": floors, "rows": table}
        if models:
            measured["models"] = {line["arch"]: line for line in models}
        write_result(
            output / "result.json",
            task=f"torch_cls_zoo/{asked.experiment}",
            command=shlex.join(["packages/torch_cls_zoo/reproduce.py", *asked.command]),
            scale=scale,
            data=data.facts(settings.image_size),
            seeds=asked.seeds,
            measured=measured,
            started=run.started,
            wall_seconds=trials.seconds,
        )
        facts, said = _facts(data, settings, asked.seeds, trials), verdicts(rows, table, floors)
        page = Page(asked.experiment, headline, data.rehearsal, facts, floors, said, models)
        path = write_page(output, page, rows, table, trials)
        for row in rows:
            run.log.say(_row_line(row.name, table[row.name]))
        run.log.say(f"{format_seconds(time.monotonic() - clock)}; report: {path}")
        for line in (*said, headline):
            run.log.say(line)
    return 0


def found_images(asked: Asked) -> tuple[str, Path | None]:
    """The scale, ``auto`` resolved, and the folder of images; None for drawn scenes.

    Raises:
        FileNotFoundError: a scale that needs images, and none are there.
    """
    folder = find_data(asked.data_path, asked.data_root)
    if asked.scale == "auto":
        return ("rehearsal", None) if folder is None else ("full", folder)
    if asked.scale == "rehearsal":
        return "rehearsal", None
    if folder is None:
        raise FileNotFoundError(
            f"--scale {asked.scale} needs images: clothing-10 is not below --data-root "
            f"{asked.data_root}; name a folder by --data-path"
        )
    return asked.scale, folder


def chosen_rows(experiment: str, names: Sequence[str] | None) -> list[Row]:
    """The rows asked for and those they learn from, in the table's order.

    Raises:
        UsageError: an unknown name.
    """
    rows = EXPERIMENTS[experiment]
    if names is None:
        return list(rows)
    known = {row.name: row for row in rows}
    wanted: set[str] = set()
    for name in names:
        if name not in known:
            raise UsageError(f"--rows {name!r}: expected some of {', '.join(known)}")
        wanted |= {name, *known[name].needs}
    return [row for row in rows if row.name in wanted]


def headline_of(experiment: str, scale: str, folder: Path | None, settings: Recipe) -> str:
    """What is run on what: the first and the last line."""
    size, arch = settings.image_size, settings.arch
    if folder is None:
        return (
            f"REHEARSAL of {experiment} on built-in scenes: it shows that every step runs; its "
            "numbers are no result"
        )
    how = "as published" if scale == "full" else "shortened: a small net, few epochs"
    return f"{experiment}, {scale} ({how}): {arch} at {size} pixels on {folder.name}"


def _run_cells(
    asked: Asked,
    run: OpenRun,
    rows: Sequence[Row],
    reasons: dict[str, str | None],
    settings: Recipe,
    data: PreparedData,
) -> Trials:
    extra = ["--init", asked.init]
    if asked.threads is not None:
        extra += ["--threads", str(asked.threads)]
    workers = () if asked.workers is None else ("--workers", str(asked.workers))
    todo = [row for row in rows if reasons[row.name] is None]
    cells = cells_of(todo, asked.seeds, settings, extra=extra, split_hash=data.manifest.hash)
    bench = Bench(run.folder, data, {row.name: row for row in rows}, workers)
    return run_trials(
        cells,
        bench.measure,
        folder=run.folder,
        shard=asked.shard,
        merge=asked.merge,
        show="accuracy",
        say=run.log.say,
    )


def _floors(run: OpenRun, data: PreparedData, settings: Recipe) -> dict[str, Any]:
    """Accuracy without training a network, by kind of features."""

    def measure(cell: Cell, place: Path) -> dict[str, Any]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return measure_floors(
            data, side=settings.image_size, threads=None, device=device, say=run.log.say
        ).facts()

    cell = Cell("floors", {"split": data.manifest.hash, "side": settings.image_size}, 0)
    found: dict[str, Any] = (run_cell(cell, measure, folder=run.folder) or {})["result"]
    run.log.say(f"without a network: {found['plain']:.4f} with plain features")
    if NAME in found:
        run.log.say(f"{NAME}: {found[NAME]['accuracy']:.4f}")
    return found


def _models(run: OpenRun, rows: Sequence[Row], scale: str) -> list[dict[str, Any]]:
    """Parameters, multiply-adds, CPU time and ONNX size beside the published table.

    A rehearsal times each network once and writes no ONNX file.
    """
    from torch_cls_zoo.experiments.model_table import measure

    names, rehearsal = [row.name for row in rows], scale == "rehearsal"

    def table(cell: Cell, place: Path) -> dict[str, Any]:
        return {"table": measure(names, rounds=1 if rehearsal else 7, onnx=not rehearsal)}

    cell = Cell("model table", {"networks": names, "scale": scale}, 0)
    return list((run_cell(cell, table, folder=run.folder) or {})["result"]["table"])


def _facts(
    data: PreparedData, settings: Recipe, seeds: Sequence[int], trials: Trials
) -> list[tuple[str, Any]]:
    images, classes = len(data.manifest.entries), len(data.classes)
    return [
        ("data", f"{data.name}, {images} images, {classes} classes"),
        ("split", data.manifest.hash[:12]),
        *asdict(settings).items(),
        ("seeds", ", ".join(map(str, seeds))),
        ("minutes", round(trials.seconds / 60, 1)),
    ]


def _row_line(name: str, entry: dict[str, Any]) -> str:
    if "accuracy" not in entry:
        return f"  {name}: {entry['not_run']}"
    deviation = entry["accuracy"]["std"]
    shown = "" if deviation is None else f" ± {deviation:.4f}"
    return f"  {name}: {entry['accuracy']['mean']:.4f}{shown}"
