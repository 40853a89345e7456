"""The papers' claims as a sweep: a student for each arm and seed, pairs, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpkd.experiments.bench import Bench, student_parameters
from mpkd.experiments.claim_arms import ARMS, FP32, arms_of
from mpkd.experiments.claim_report import summarise_claims, write_claims_report
from mpkd.experiments.sweep import SweepOptions, run_sweep, settings_shown
from shared_core.trials import Cell, Trials


def claim_cells(bench: Bench, arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every arm of a seed, then the next; every student but fp32's kin starts from fp32's."""
    cells = []
    for seed in seeds:
        for name in arms:
            arm = ARMS[name]
            changes = dict(arm.changes)
            if "quantization.epochs" in changes:  # so many times as long
                longer = changes["quantization.epochs"] * bench.config["quantization.epochs"]
                changes["quantization.epochs"] = int(longer)
            if arm.kind == "train":
                changes["distillation.mode"] = "labels"
            needs = FP32 if arm.kind == "quantize" else ""
            cells.append(bench.cell(name, arm.kind, changes, seed=seed, needs=needs))
    return cells


def run_claims(options: SweepOptions, *, claims: Sequence[str]) -> int:
    """Make the students that are missing, compare, write. Returns the exit code."""
    arms = arms_of(list(claims))

    def finish(bench: Bench, teacher: dict[str, Any], trials: Trials) -> dict[str, Any]:
        return {
            **summarise_claims(trials, claims), "teacher": teacher,
            "student_parameters": student_parameters(bench),
            "settings": settings_shown(bench.config),
        }  # fmt: skip

    def page(folder: Path, record: Mapping[str, Any], line: str) -> None:
        write_claims_report(folder, record, line=line)
        for name, claim in record["measured"]["claims"].items():
            print(f"{name}: {claim['text']}", flush=True)

    return run_sweep(
        options, cells=lambda bench: claim_cells(bench, arms, options.seeds), finish=finish,
        page=page,
    )  # fmt: skip
