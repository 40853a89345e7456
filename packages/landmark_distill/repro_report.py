"""The report of a reproduction: table, paired differences, ROC, nearest neighbours, curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landmark_distill.openset import OpenSetResult, nearest_sheet
from landmark_distill.repro_settings import ARMS
from landmark_distill.roc_plot import plot_roc
from shared_core.checkpoints import atomic_write
from shared_core.runs import Report, read_metrics

if TYPE_CHECKING:
    from landmark_distill.landmark_data import LandmarkData
    from landmark_distill.reproduction import Reproduction

ROC, SHEET, CURVES = "roc.png", "nearest.png", "training.png"
COLUMNS = {
    "vr_0.1": "VR at FAR 0.1",
    "vr_0.01": "VR at FAR 0.01",
    "vr_0.001": "VR at FAR 0.001",
    "recall_at_1": "recall@1",
    "map_at_r": "mAP@R",
    "coarse_vr_0.01": "coarse VR at FAR 0.01",
}


def _spread(one: Mapping[str, float]) -> str:
    return f"{one['mean']:.4f} ± {one['std']:.4f}"


def _gap(one: Mapping[str, float]) -> str:
    return f"{one['mean']:+.4f} ± {one['std']:.4f} ({one['wins']}/{one['n']})"


def write_report(
    work: Reproduction,
    record: dict[str, Any],
    data: LandmarkData,
    drawn: Mapping[str, OpenSetResult],
    features: np.ndarray,
    *,
    title: str,
) -> None:
    """Draw the pictures and write ``report.md`` and ``report.html``.

    Args:
        drawn: what the ROC shows, by name.
        features: of the first fixed-head student, for the sheet.
        title: the line that says what was run on what.
    """
    folder, measured, args = work.folder, record["measured"], work.args
    report = Report(f"landmark_distill: {args.recipe} through a shared frozen head")
    (report.note if data.rehearsal else report.text)(title)
    environment = record["environment"]
    hardware = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    report.text(
        f"Measured on {hardware}, torch {environment['packages'].get('torch')}, seeds "
        f"{', '.join(map(str, record['seeds']))}, {record['wall_seconds'] / 60:.1f} minutes. "
        f"Command: {record['command']}"
    )
    for note in data.notes:
        report.text(f"Groups of classes that nobody learned, {note}.")

    report.heading("Unseen classes")
    columns = [*COLUMNS.values()]
    rows: list[list[object]] = [
        ["plain features, no network", *[f"{measured['floor'][n]:.4f}" for n in COLUMNS]]
    ]
    if "teacher" in measured:
        rows.append(["teacher", *[f"{measured['teacher'][n]:.4f}" for n in COLUMNS]])
    for arm, (label, _) in ARMS.items():
        row = measured["arms"][arm]
        rows.append([f"student, {label}", *[_spread(row[n]) for n in COLUMNS]])
    report.table(["", *columns], rows)
    report.text(
        "VR is the verification rate: genuine pairs accepted at a share of accepted impostor pairs "
        "(FAR), over all pairs of the test images. Students: mean and sample deviation over seeds. "
        "All students see the same augmented views; their weights and the order differ by seed."
    )
    report.heading("Paired differences")
    report.table(
        ["", *columns],
        [[name, *[_gap(row[n]) for n in COLUMNS]] for name, row in measured["paired"].items()],
    )
    report.text(
        "fixed: the teacher's frozen head. own: distilled, with a head that learns. none: a head "
        "that learns, from the labels alone. Mean and deviation of the difference by seed, and how "
        "often the first is ahead."
    )
    for other in list(ARMS)[1:]:
        report.text(_verdict(measured["paired"][f"fixed - {other}"]["vr_0.01"], other))

    plot_roc(
        folder / ROC,
        {name: result.curves["fine"] for name, result in drawn.items()},
        title="Verification among unseen classes, first seed",
    )
    report.figure(folder / ROC, "Genuine pairs accepted against impostor pairs accepted.")
    paths = [Path(path) for path in data.test.paths or []]
    nearest_sheet(folder / SHEET, features, list(paths), data.test.labels, queries=8, k=8)
    report.figure(
        folder / SHEET,
        "Images of unseen classes and their nearest others by the fixed-head student, first seed; "
        "green: the same class.",
    )
    report.heading("Training")
    _curves(work, measured, folder / CURVES)
    report.figure(folder / CURVES, "Accuracy on held-out images of the learned classes by epoch.")
    report.table(
        ["run", "parameters", "best epoch", "accuracy, learned classes", "seconds"],
        [
            [name, one["parameters"], one["best_epoch"], one["calibration_accuracy"],
             round(one["seconds"], 1)]
            for name, one in _all_runs(measured)
        ],
    )  # fmt: skip
    report.write(folder)


def _verdict(gap: Mapping[str, float], other: str) -> str:
    """One sentence on the paired difference at FAR 0.01; no more than the seeds show."""
    what = {"own": "the distilled student with its own head", "none": "the undistilled student"}
    side = "ahead of" if gap["mean"] > 0 else "BEHIND"
    sure = gap["low"] > 0 or gap["high"] < 0
    return (
        f"At FAR 0.01 the fixed-head student is {100 * abs(gap['mean']):.1f} points {side} "
        f"{what[other]}, on {gap['wins']} of {gap['n']} seeds; the 95 % interval of the difference "
        f"[{100 * gap['low']:.1f}, {100 * gap['high']:.1f}] "
        + ("leaves out 0." if sure else "holds 0, so the sign is not certain.")
    )


def _all_runs(measured: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    runs = [("teacher", measured["teacher"])] if "teacher" in measured else []
    for arm, found in measured["runs"].items():
        runs += [(f"{arm}, run {i + 1}", one) for i, one in enumerate(found)]
    return runs


def _curves(work: Reproduction, measured: Mapping[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"teacher": "0.4", "fixed": "C0", "own": "C1", "none": "C2"}
    for name, one in _all_runs(measured):
        lines = read_metrics(work.folder / one["folder"] / "metrics.jsonl")
        points = [(line["step"], line["acc"]) for line in lines if line["split"] == "val"]
        arm = name.split(",")[0]
        first = arm == "teacher" or name.endswith("run 1")
        axes.plot(
            *zip(*points, strict=True), color=colours[arm], lw=1, label=arm if first else None
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda scratch: figure.savefig(scratch, format="png"))
