"""The matrix as a sweep: which rows, what the record says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpkd.experiments.bench import Bench, student_parameters
from mpkd.experiments.matrix import (
    LABELS,
    PRECISIONS,
    TEMPERATURES,
    cell_name,
    columns,
    latency_cell,
    matrix_cells,
)
from mpkd.experiments.matrix_report import summary, write_report
from mpkd.experiments.sweep import SweepOptions, run_sweep
from shared_core.for_torch.precision import computes_bf16
from shared_core.trials import Cell, Trials, run_cell


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
        timed, measure = latency_cell(bench, first)
        known = run_cell(timed, measure, folder=bench.folder)["result"]
        named = columns(TEMPERATURES)
        return {
            "columns": named, "left_out": left_out, **summary(trials, named), "teacher": teacher,
            "student_parameters": student_parameters(bench), "ms": known["ms"],
            "cells": {f"{name} | {seed}": row for (name, seed), row in trials.results.items()},
        }  # fmt: skip

    def page(folder: Path, record: Mapping[str, Any], line: str) -> None:
        write_report(folder, record, line=line)
        for precision, row in record["measured"]["table"].items():
            values = (f"{100 * row[c]['test_accuracy']['mean']:5.1f}" for c in row)
            print(f"{precision:>12}: " + "  ".join(values), flush=True)

    return run_sweep(options, cells=cells, finish=finish, page=page)
