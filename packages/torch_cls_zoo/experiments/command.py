"""The command of the experiments: which cells are left, run them, write the record and the page."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shared_core.metrics.floor import floor_accuracy
from shared_core.runs import RunFolder, StageLog, UsageError, write_result
from shared_core.runs.folder import remove_run
from shared_core.runs.progress import format_seconds
from torch_cls_zoo.experiments.cells import Bench
from torch_cls_zoo.experiments.data import find_data, open_images
from torch_cls_zoo.experiments.page import summarize_rows, write_page
from torch_cls_zoo.experiments.recipes import SCALES, SEEDS, Recipe, recipe
from torch_cls_zoo.experiments.rows import EXPERIMENTS, Row

RUN_KEYS = {"experiment", "recipe"}  # tell our runs by


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description="Run one of the README's tables as an experiment."
    )
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS))
    add("--data-root", type=Path, help="folder that holds data sets, clothing-10 among them")
    add("--data-path", type=Path, help="a folder of images (train/, val/, test/ or class folders)")
    add("--scale", default="auto", choices=("auto", *SCALES),
        help="auto: full when images are found, else a rehearsal on drawn scenes")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--rows", nargs="+", metavar="NAME", help="only these rows, and those they learn from")
    add("--output", type=Path, help="(runs/torch_cls_zoo/<experiment>-<scale>)")
    add("--pretrained", nargs="?", const="default", metavar="FILE",
        help="start every row from the library's weights, or from a file")  # fmt: skip
    add("--threads", type=int, help="threads that compute, 0: torch decides")
    add("-j", "--workers", type=int, help="threads that decode")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--continue", dest="go_on", action="store_true",
        help="go on with an earlier run of the same settings")  # fmt: skip
    group.add_argument("--fresh", action="store_true", help="delete an earlier run first")
    return parser


def run_main(argv: Sequence[str] | None) -> int:
    """Run what the command line asks for. Returns the exit code."""
    args = build_parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    started, clock = datetime.now(timezone.utc), time.monotonic()
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"--seeds {args.seeds}: expected different numbers of at least 0")
    rows = chosen_rows(args.experiment, args.rows)
    folder = find_data(args.data_path, args.data_root)
    scale = args.scale
    if scale == "auto":
        scale = "full" if folder is not None else "rehearsal"
    if scale == "rehearsal":
        folder = None
    elif folder is None:
        raise FileNotFoundError(
            f"--scale {scale} needs images: clothing-10 is not below --data-root {args.data_root}; "
            "name a folder by --data-path"
        )
    settings = recipe(scale, args.experiment)
    output = args.output or Path("runs") / "torch_cls_zoo" / f"{args.experiment}-{scale}"
    if args.fresh:
        remove_run(output, keys=RUN_KEYS)
    config = {
        "experiment": args.experiment,
        "scale": scale,
        "data": None if folder is None else str(folder),
        "pretrained": args.pretrained,
        "recipe": asdict(settings),
        "seeds": args.seeds,
        "rows": [row.name for row in rows],
    }
    try:
        RunFolder.create(output, config, resume=args.go_on, may_differ=("seeds", "rows"))
    except FileExistsError:
        raise UsageError(f"{output} holds a run: add --continue or --fresh") from None
    log = StageLog(output)
    headline = _headline(args.experiment, scale, folder, settings)
    log.say(headline)
    data = open_images(
        folder,
        output,
        known=args.data_path is None,
        classes=settings.classes,
        images=settings.images,
        cache_side=settings.cache_side,
    )
    log.say(data.manifest.summary())
    floor = _floor(log, data)
    extra = _extra(args)
    bench = Bench(output, args.experiment, settings, data, extra=extra)
    todo = [row for row in rows if not _skipped(row, scale, args.pretrained)]
    cells = _run_cells(bench, log, todo, args.seeds)
    table = model_table(log, rows, scale) if args.experiment == "models" else []
    measured: dict[str, Any] = {
        "floor": floor,
        "rows": summarize_rows(_reasoned(rows, scale, args.pretrained), cells, scale=scale),
    }
    if table:
        measured["models"] = {line["arch"]: line for line in table}
    seconds = sum(result.get("seconds", 0.0) for result in log.stages.values())
    facts = [
        ("data", f"{data.name}, {len(data.manifest.entries)} images, {len(data.classes)} classes"),
        ("split", data.manifest.hash[:12]),
        *((key, value) for key, value in asdict(settings).items()),
        ("seeds", ", ".join(map(str, args.seeds))),
        ("minutes", round(seconds / 60, 1)),
    ]
    write_result(
        output / "result.json",
        task=f"torch_cls_zoo/{args.experiment}",
        command=shlex.join(["packages/torch_cls_zoo/reproduce.py", *words]),
        scale=scale,
        data=data.facts(settings.image_size),
        seeds=args.seeds,
        measured=measured,
        started=started,
        wall_seconds=seconds,
    )
    page = write_page(
        output,
        args.experiment,
        _reasoned(rows, scale, args.pretrained),
        measured,
        headline=headline,
        rehearsal=data.rehearsal,
        facts=facts,
        floor=floor,
        model_table=table,
    )
    _say_rows(log, measured["rows"], floor)
    log.say(f"{format_seconds(time.monotonic() - clock)}; report: {page}")
    log.say(headline)
    return 0


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
        wanted |= {name, *(source.removesuffix(":labels") for source in known[name].learns_from)}
    return [row for row in rows if row.name in wanted]


def _skipped(row: Row, scale: str, pretrained: str | None) -> str | None:
    """Why a row is not run."""
    if "--pretrained" in row.without and pretrained is None:
        return "no row starts from pretrained weights here, so this is the baseline"
    return dict(row.skip).get(scale)


def _reasoned(rows: Sequence[Row], scale: str, pretrained: str | None) -> list[Row]:
    """The rows with all reasons written into them."""
    from dataclasses import replace

    told = []
    for row in rows:
        reason = _skipped(row, scale, pretrained)
        told.append(replace(row, skip=((scale, reason),)) if reason else row)
    return told


def _extra(args: argparse.Namespace) -> list[str]:
    extra: list[str] = []
    if args.pretrained is not None:
        extra += ["--pretrained"] + ([args.pretrained] if args.pretrained != "default" else [])
    if args.threads is not None:
        extra += ["--threads", str(args.threads)]
    if args.workers is not None:
        extra += ["--workers", str(args.workers)]
    return extra


def _headline(experiment: str, scale: str, folder: Path | None, settings: Recipe) -> str:
    size, arch = settings.image_size, settings.arch
    if folder is None:
        return (
            f"REHEARSAL of {experiment} on built-in scenes: it shows that every step runs; its "
            "numbers are no result"
        )
    how = "as published" if scale == "full" else "shortened: a small net, few epochs"
    return f"{experiment}, {scale} ({how}): {arch} at {size} pixels on {folder.name}"


def _floor(log: StageLog, data: Any) -> dict[str, float]:
    done = log.done("floor")
    if done is None:
        begun = time.monotonic()
        train, test = data.image_set("train"), data.image_set("test")
        floor = floor_accuracy(train.paths, train.labels, test.paths, test.labels)
        done = log.finish("floor", {"floor": floor, "seconds": time.monotonic() - begun})
    floor = dict(done["floor"])
    log.say(f"without a network: {floor['plain']:.4f} with plain features")
    return floor


def _run_cells(
    bench: Bench, log: StageLog, rows: Sequence[Row], seeds: Sequence[int]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Run what is not done yet, seed by seed, so that a stopped run has whole rows of a seed."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    plan = [(seed, row) for seed in seeds for row in rows]
    left = [one for one in plan if log.done(_name(one[1], one[0])) is None]
    begun, finished = time.monotonic(), 0
    for seed, row in plan:
        name = _name(row, seed)
        done = log.done(name)
        if done is None:
            done = log.finish(name, bench.run(row, seed))
            log.write(row.name, "test", seed, {"accuracy": done["accuracy"]})
            finished += 1
            rest = (time.monotonic() - begun) / finished * (len(left) - finished)
            log.say(
                f"{row.name}, seed {seed}: {done['accuracy']:.4f} "
                f"({done['seconds']:.0f} s; {format_seconds(rest)} left)"
            )
        bench.clean(row, seed)
        cells.setdefault(row.name, {})[seed] = done
    return cells


def _name(row: Row, seed: int) -> str:
    return f"{row.name} | seed {seed}"


def model_table(log: StageLog, rows: Sequence[Row], scale: str) -> list[dict[str, Any]]:
    """Parameters, multiply-adds, CPU time and ONNX size beside the published table.

    A rehearsal times each network once and writes no ONNX file.
    """
    done = log.done("model table")
    if done is None:
        from torch_cls_zoo.utils.model_table import costs, forward_ratios, onnx_bytes, table_row

        begun, names = time.monotonic(), [row.name for row in rows]
        rehearsal = scale == "rehearsal"
        times = forward_ratios(names, rounds=1 if rehearsal else 7)
        table = []
        for name in names:
            found: dict[str, Any] = {**costs(name), **times[name]}
            if not rehearsal:
                found["onnx_bytes"] = onnx_bytes(name)
            table.append(table_row(name, found))
        done = log.finish("model table", {"table": table, "seconds": time.monotonic() - begun})
    return list(done["table"])


def _say_rows(log: StageLog, rows: dict[str, Any], floor: dict[str, float]) -> None:
    for name, entry in rows.items():
        if "accuracy" in entry:
            spread = entry["accuracy"]["std"]
            shown = "" if spread is None else f" ± {spread:.4f}"
            log.say(f"  {name}: {entry['accuracy']['mean']:.4f}{shown}")
        else:
            log.say(f"  {name}: {entry['not_run']}")
