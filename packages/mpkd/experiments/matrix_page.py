"""The matrix as a sweep: its rows, means over seeds, paired differences, plots, a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpkd.analysis import plots
from mpkd.analysis.verdicts import PLAIN_FLOOR, TRAINED_FLOOR, against, helped, verdicts
from mpkd.experiments.bench import Bench, student_parameters
from mpkd.experiments.matrix import (
    LABELS,
    PRECISIONS,
    QUANTIZED,
    TEMPERATURES,
    cell_name,
    columns,
    floor_cell,
    latency_cell,
    matrix_cells,
)
from mpkd.experiments.sweep import SweepOptions, run_sweep
from mpkd.utils.common import starts_trained
from shared_core.for_torch.precision import computes_bf16
from shared_core.runs import Report
from shared_core.trials import Cell, Trials, compare, run_cell, spread

JUDGED = "KD T=4"  # the column that the verdict is on, whatever came out
METRICS = ("test_accuracy", "agreement", "bytes", "mean_bits")


def rows_of(trials: Trials) -> list[str]:
    """The precisions that were tried, in their order."""
    tried = {name.partition(" | ")[0] for name in trials.names}
    return [precision for precision in PRECISIONS if precision in tried]


def summary(trials: Trials, columns: Sequence[str]) -> dict[str, Any]:
    """Mean and deviation of each cell, and the paired differences that the matrix is made for."""
    table: dict[str, Any] = {}
    for precision in rows_of(trials):
        table[precision] = {
            column: {
                metric: {k: v for k, v in spread(trials.values(cell_name(precision, column),
                                                               metric)).items() if k != "values"}
                for metric in METRICS
            }
            for column in columns
        }  # fmt: skip
    return {"table": table, "differences": differences(trials, columns)}


def differences(trials: Trials, columns: Sequence[str]) -> dict[str, Any]:
    """``a - b`` in test accuracy, paired by seed: teacher against labels, few bits against fp32."""
    pairs: dict[str, tuple[str, str]] = {}
    for precision in rows_of(trials):
        for column in columns:
            own = cell_name(precision, column)
            if column != LABELS:
                pairs[f"{precision}: {column} - labels"] = (own, cell_name(precision, LABELS))
            if precision != "fp32":
                pairs[f"{column}: {precision} - fp32"] = (own, cell_name("fp32", column))
    found = {name: compare(trials, *pair, "test_accuracy") for name, pair in pairs.items()}
    return {
        name: {key: value for key, value in one.plain().items() if key != "values"}
        for name, one in found.items()
        if one.interval is not None
    }


def matrix_verdicts(
    found: Mapping[str, Any],
    teacher: Mapping[str, Any],
    floors: Mapping[str, Mapping[str, Any]],
    *,
    data_name: str,
    start: bool,
) -> list[str]:
    """Sentences on the fp32 student of ``JUDGED`` beside floors, teacher and labels.

    Args:
        found: what :func:`summary` gave.
        start: whether the student started from trained weights.
    """
    student = found["table"]["fp32"][JUDGED]["test_accuracy"]["mean"]
    stages = {
        "prepare": {"name": data_name}, "teacher": teacher,
        "distil": {"test_accuracy": student, "start": start},
        "floor": {"floor": floors.get(PLAIN_FLOOR)},
    }  # fmt: skip
    said = [*against(teacher["test_accuracy"], floors, "teacher"), *verdicts(stages)]
    gap = found["differences"].get(f"fp32: {JUDGED} - labels")
    what = f"fp32, {JUDGED} against labels"
    return [
        *said,
        helped(gap, what) if gap else "One seed does not say whether distillation helped.",
    ]


def _pm(value: Mapping[str, Any]) -> str:
    std = value["std"]
    return f"{100 * value['mean']:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def write_report(folder: Path, record: Mapping[str, Any], *, line: str) -> None:
    """Draw the plots and write ``report.md`` and ``report.html``."""
    measured, environment = record["measured"], record["environment"]
    report = Report("mpkd: precision x distillation")
    said = report.note if record["data"]["kind"] == "built-in" else report.text
    said(" ".join([line, *measured["verdicts"]]))
    report.text(
        f"Measured on {environment['gpu'] or environment['cpu']} with torch "
        f"{environment['packages'].get('torch')}, seeds {', '.join(map(str, record['seeds']))}, "
        f"{record['wall_seconds'] / 60:.1f} minutes. Command: {record['command']}"
    )
    _accuracies(report, folder, measured)
    _sizes(report, folder, measured, first=record["seeds"][0])
    if measured["differences"]:
        report.heading("Differences in points, paired by seed")
        report.table(
            ["difference", "mean", "95 % interval", "seeds won"],
            [
                [name, f"{round(100 * d['mean'], 1) + 0.0:+.1f}",  # no -0.0
                 f"{100 * d['low']:.1f} to {100 * d['high']:.1f}",
                 f"{d['wins']} of {d['n']}"]
                for name, d in measured["differences"].items()
            ],
        )  # fmt: skip
    report.heading("Time of one image, milliseconds")
    report.table(["runtime, batch 1, 1 thread", "ms"], [list(i) for i in measured["ms"].items()])
    report.text("Weights of fewer than 8 bits have no kernels on this processor: no time for them.")
    cells = measured["cells"].items()
    said = Counter((name.split(" | ")[0], n) for name, one in cells for n in one.get("notes", ()))
    if said:
        report.heading("Notes")
        report.table(
            ["row", "note", "cells"], [[*key, count] for key, count in sorted(said.items())]
        )
    report.write(folder)


def _accuracies(report: Report, folder: Path, measured: Mapping[str, Any]) -> None:
    """The table and the plot of test accuracy, and the table of agreement."""
    table, columns, teacher = measured["table"], measured["columns"], measured["teacher"]
    rows = list(table)
    report.heading("Test accuracy, percent")
    report.text(
        f"Teacher {teacher['name']}: {100 * teacher['test_accuracy']:.1f} with "
        f"{teacher['parameters']:,} parameters. Student: {measured['student_parameters']:,}. Mean "
        "and sample deviation over the seeds; KD columns never see a label."
    )
    report.table(
        ["precision", *columns, "KiB on disk", "bits a weight"],
        [
            [p, *(_pm(table[p][c]["test_accuracy"]) for c in columns),
             table[p][LABELS]["bytes"]["mean"] / 1024, table[p][LABELS]["mean_bits"]["mean"]]
            for p in rows
        ],
    )  # fmt: skip
    for row, reason in measured.get("left_out", {}).items():
        report.text(f"{row} was left out: {reason}.")
    series = {
        c: [(table[p][c]["test_accuracy"]["mean"], table[p][c]["test_accuracy"]["std"] or 0.0)
            for p in rows]
        for c in columns
    }  # fmt: skip
    figure = plots.bars(folder / "matrix.png", rows, series, ylabel="test accuracy, percent")
    report.figure(figure, "Every cell; whiskers are one sample deviation.")
    report.heading("Agreement with the teacher, percent of the test images")
    report.table(
        ["precision", *columns],
        [[p, *(_pm(table[p][c]["agreement"]) for c in columns)] for p in rows],
    )


def _sizes(report: Report, folder: Path, measured: Mapping[str, Any], *, first: int) -> None:
    """Accuracy against size, and the bits of each layer."""
    table, teacher = measured["table"], measured["teacher"]
    points = [("teacher", 4 * teacher["parameters"] / 1024, teacher["test_accuracy"])]
    best = max(
        measured["columns"], key=lambda c: table["fp32"][c]["test_accuracy"]["mean"]
    )  # fmt: skip
    points += [
        (p, row[best]["bytes"]["mean"] / 1024, row[best]["test_accuracy"]["mean"])
        for p, row in table.items()
        if p != "bf16"  # its weights are kept in fp32
    ]
    figure = plots.pareto(folder / "pareto.png", points, xlabel=f"KiB on disk ({best})")
    report.figure(figure, "Accuracy against size; hollow points are beaten.")
    cells = measured["cells"]
    bits = {f"{p}, {best}": cells[f"{cell_name(p, best)} | {first}"]["w_bits"] for p in QUANTIZED}
    report.figure(plots.bit_bars(folder / "bits.png", bits), "Bits of each layer, first seed.")


def rows_left_out(*, emulate: bool, scale: str, device: torch.device) -> dict[str, str]:
    """Precisions that are not tried, with the reason: what the hardware only emulates."""
    if emulate or scale == "rehearsal" or computes_bf16(device):
        return {}
    return {"bf16": "this hardware only emulates it; --emulate-bf16 trains it all the same"}


def run_matrix(options: SweepOptions, *, emulate: bool) -> int:
    """Make every cell that is left, compare, write. Returns the exit code."""
    left_out: dict[str, str] = {}

    def cells(bench: Bench) -> list[Cell]:
        left_out.update(rows_left_out(emulate=emulate, scale=options.scale, device=bench.device))
        for row, reason in left_out.items():
            bench.log.say(f"{row} is left out: {reason}")
        rows = [precision for precision in PRECISIONS if precision not in left_out]
        return matrix_cells(
            bench, seeds=options.seeds, temperatures=TEMPERATURES, precisions=rows
        )  # fmt: skip

    def finish(bench: Bench, teacher: dict[str, Any], trials: Trials) -> dict[str, Any]:
        first = next(c for c in trials.cells if c.name == cell_name("fp32", LABELS))
        timed, plain = (
            run_cell(*cell, folder=bench.folder)["result"]
            for cell in (latency_cell(bench, first), floor_cell(bench))
        )
        named = columns(TEMPERATURES)
        found = summary(trials, named)
        pairs = {TRAINED_FLOOR: teacher["floor"], PLAIN_FLOOR: plain}
        floors = {name: floor for name, floor in pairs.items() if floor}
        return {
            "columns": named, "left_out": left_out, **found, "teacher": teacher, "floors": floors,
            "verdicts": matrix_verdicts(
                found, teacher, floors, data_name=bench.data.name,
                start=starts_trained(bench.config, "student"),
            ),
            "student_parameters": student_parameters(bench), "ms": timed["ms"],
            "cells": {f"{name} | {seed}": row for (name, seed), row in trials.results.items()},
        }  # fmt: skip

    def page(folder: Path, record: Mapping[str, Any], line: str) -> None:
        write_report(folder, record, line=line)
        for precision, row in record["measured"]["table"].items():
            values = (f"{100 * row[c]['test_accuracy']['mean']:5.1f}" for c in row)
            print(f"{precision:>12}: " + "  ".join(values), flush=True)

    return run_sweep(options, cells=cells, finish=finish, page=page)
