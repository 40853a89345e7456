"""What a matrix leaves for a reader: means over seeds, paired differences, plots, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpkd.analysis import plots
from mpkd.matrix import LABELS, PRECISIONS, QUANTIZED, cell_name
from shared_core.metrics import paired_difference, summarize
from shared_core.runs import Report

Cells = Mapping[str, Mapping[str, Any]]


def rows_of(cells: Cells) -> list[str]:
    """The precisions that were tried, in their order."""
    tried = {name.partition(" | ")[0] for name in cells}
    return [precision for precision in PRECISIONS if precision in tried]


def summary(cells: Cells, columns: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean and deviation of each cell, and the paired differences that the matrix is made for."""
    table: dict[str, Any] = {}
    for precision in rows_of(cells):
        table[precision] = {}
        for column in columns:
            rows = [cells[cell_name(precision, column, seed)] for seed in seeds]
            row: dict[str, Any] = {}
            for key in ("test_accuracy", "agreement", "bytes", "mean_bits"):
                one = summarize([float(r[key]) for r in rows])
                row[key] = {"mean": one.mean, "std": one.std, "n": one.n}
            table[precision][column] = row
    return {"table": table, "differences": differences(cells, columns, seeds)}


def differences(cells: Cells, columns: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """``a - b`` in test accuracy, paired by seed: teacher against labels, few bits against fp32."""
    if len(seeds) < 2:
        return {}

    def runs(precision: str, column: str) -> list[float]:
        return [cells[cell_name(precision, column, s)]["test_accuracy"] for s in seeds]

    found = {}
    for precision in rows_of(cells):
        for column in columns:
            if column != LABELS:
                found[f"{precision}: {column} - labels"] = (runs(precision, column),
                                                            runs(precision, LABELS))  # fmt: skip
            if precision != "fp32":
                found[f"{column}: {precision} - fp32"] = (runs(precision, column),
                                                          runs("fp32", column))  # fmt: skip
    return {
        name: {key: getattr(gap, key) for key in ("mean", "std", "low", "high", "wins", "n")}
        for name, (a, b) in found.items()
        for gap in [paired_difference(a, b)]
    }


def _pm(value: Mapping[str, Any]) -> str:
    std = value["std"]
    return f"{100 * value['mean']:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def write_report(
    folder: Path, record: Mapping[str, Any], cells: Cells, *, line: str, command: str
) -> None:
    """Draw the plots and write ``report.md`` and ``report.html``."""
    measured = record["measured"]
    table, columns, seeds = measured["table"], measured["columns"], record["seeds"]
    rows = list(table)
    report = Report("mpkd: precision x distillation")
    (report.note if record["data"]["kind"] == "built-in" else report.text)(line)
    environment = record["environment"]
    report.text(
        f"Measured on {environment['gpu'] or environment['cpu']} with torch "
        f"{environment['packages'].get('torch')}, seeds {', '.join(map(str, seeds))}, "
        f"{record['wall_seconds'] / 60:.1f} minutes. Command: {command}"
    )
    report.heading("Test accuracy, percent")
    teacher = measured["teacher"]
    report.text(
        f"Teacher {teacher['name']}: {100 * teacher['test_accuracy']:.1f} with "
        f"{teacher['parameters']:,} parameters. Student: {measured['student_parameters']:,}. Mean "
        "and sample deviation over the seeds; KD columns never see a label."
    )
    report.table(
        ["precision", *columns, "KiB", "bits a weight"],
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
    points = [("teacher", 4 * teacher["parameters"] / 1024, teacher["test_accuracy"])]
    best = max(columns, key=lambda c: table["fp32"][c]["test_accuracy"]["mean"])
    points += [
        (p, table[p][best]["bytes"]["mean"] / 1024, table[p][best]["test_accuracy"]["mean"])
        for p in rows
        if p != "bf16"  # its weights are kept in fp32
    ]
    figure = plots.pareto(folder / "pareto.png", points, xlabel=f"KiB of weights ({best})")
    report.figure(figure, "Accuracy against size; hollow points are beaten.")
    bits = {
        f"{p}, {best}": cells[cell_name(p, best, seeds[0])]["w_bits"]
        for p in QUANTIZED
    }  # fmt: skip
    report.figure(plots.bit_bars(folder / "bits.png", bits), "Bits of each layer, first seed.")
    if measured["differences"]:
        report.heading("Differences in points, paired by seed")
        report.table(
            ["difference", "mean", "95 % interval", "seeds won"],
            [
                [name, 100 * d["mean"], f"{100 * d['low']:.1f} to {100 * d['high']:.1f}",
                 f"{d['wins']} of {d['n']}"]
                for name, d in measured["differences"].items()
            ],
        )  # fmt: skip
    report.heading("Time of one image, milliseconds")
    report.table(["runtime, batch 1, 1 thread", "ms"], [list(i) for i in measured["ms"].items()])
    report.text("Weights of fewer than 8 bits have no kernels on this processor: no time for them.")
    notes = sorted({note for cell in cells.values() for note in cell.get("notes", ())})
    if notes:
        report.heading("Searches against uniform bits")
        for note in notes:
            report.text(note)
    report.write(folder)
