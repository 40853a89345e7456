"""What a run leaves for a reader: the record, ``report.md`` and one page with its plots."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from gfnet_dynn.choices import DEFAULT_POINT
from gfnet_dynn.judge.evaluate import Judgement
from gfnet_dynn.report import run_plots as plots
from gfnet_dynn.report.lines import headline, threshold_text, verdicts, with_verdicts
from gfnet_dynn.run import Run
from shared_core import datasets
from shared_core.metrics.trained_floor import NAME
from shared_core.runs import Report, read_metrics, write_result

MODELS = {"backbone": "teacher", "student": "student", "labels": "the same student from labels"}
SAMPLES = 8  # images an exit on the sheet


def write_record(
    run: Run, measured: dict[str, Any], *, command: str, started: datetime, seconds: float
) -> dict[str, Any]:
    """``result.json``."""
    return write_result(
        run.folder / "result.json",
        task=f"gfnet_dynn/{run.settings.source.data_set.lower()}",
        command=command,
        scale=run.settings.scale,
        data=run.data.facts(),
        seeds=[run.settings.seed],
        measured=measured,
        started=started,
        wall_seconds=seconds,
    )


def write_report(run: Run, record: dict[str, Any], judged: Judgement) -> None:
    """Draw the plots and write both forms of the report."""
    measured = record["measured"]
    report = Report(f"GFNet with early exits on {run.data.name}")
    first = with_verdicts(headline(run), verdicts(measured, rehearsal=run.data.rehearsal))
    (report.note if run.data.rehearsal else report.text)(first)
    for note in run.data.notes:
        report.text(f"Of the data: {note}.")
    report.text(_circumstances(run, record))
    report.heading("Result on the test split")
    _result_table(report, measured)
    report.text(
        "Thresholds were fitted on the calibration split: careful loses nothing there against the "
        f"final head, balanced at most {run.settings.judging.max_accuracy_loss:g}, fast spends "
        "half the MACs. Accuracies of the exits are from passes in which samples really leave; "
        "times are medians over rounds in which all models take turns, of a GPU on the clock, of a "
        "CPU the time that one thread computes; decoding is not included."
    )
    report.figure(
        plots.accuracy_cost(run.folder, measured, judged.sweep, judged.other_sweeps),
        "Accuracy against MACs.",
    )
    unit = "GPU" if record["environment"]["gpu"] else "CPU, 1 thread"
    report.figure(
        plots.accuracy_time(run.folder, measured, unit=unit), "Accuracy against measured time."
    )
    report.heading("The exits")
    _exit_tables(report, measured["exits"])
    _exit_figures(report, run, judged)
    report.heading("Training")
    log = run.folder / "metrics.jsonl"  # none where a model from elsewhere was evaluated
    lines = read_metrics(log) if log.exists() else []
    report.figure(plots.training_curves(run.folder, lines, judged.exits), "Curves by epoch.")
    report.write(run.folder)


def _circumstances(run: Run, record: dict[str, Any]) -> str:
    environment = record["environment"]
    count = environment["threads"]
    threads = "1 thread" if count == 1 else f"{count} threads"
    hardware = environment["gpu"] or f"{environment['cpu']}, {threads}"
    return (
        f"Measured on {hardware} with torch {environment['packages'].get('torch')}, "
        f"trained in {run.precision}, evaluated in fp32, seed {run.settings.seed}, "
        f"{record['wall_seconds'] / 60:.1f} minutes. Command: {record['command']}"
    )


def _result_table(report: Report, measured: dict[str, Any]) -> None:
    """A row a model: accuracy, parameters, MACs, times."""
    exits = measured["exits"]
    labels = list(exits["ms_per_image_without_exits"])
    rows: list[list[object]] = [
        [f"{name} features, linear", measured["floor"][name], *[None] * (2 + len(labels))]
        for name in ("plain", "engineered")
        if "floor" in measured
    ]
    if trained := measured.get("trained_floor"):
        accuracy = trained["accuracy"]
        rows.append([f"{NAME} ({trained['network']})", accuracy, *[None] * (2 + len(labels))])

    def row(label: str, accuracy: float, parameters: int, macs: float, times: Any) -> None:
        rows.append([label, accuracy, parameters / 1e6, macs / 1e6, *times])

    for name, label in MODELS.items():
        if name in measured:
            one = measured[name]
            times = one["ms_per_image"].values()
            row(
                label if "student" in measured else name,
                one["accuracy"],
                one["parameters"],
                one["macs"],
                times,
            )
    final, parameters = exits["final_accuracy"], exits["parameters"]
    plain = exits["ms_per_image_without_exits"].values()
    row("its exits taken away", final, parameters, exits["macs_without_exits"], plain)
    past_all = [times[-1] for times in exits["ms_per_image_at_exits"].values()]
    row("with exits, nobody leaves", final, parameters, exits["macs_per_exit"][-1], past_all)
    for name, point in exits["points"].items():
        times = point["ms_per_image"].values()
        row(f"with exits, {name}", point["accuracy"], parameters, point["macs"], times)
    times = [f"ms an image, {label}" for label in labels]
    report.table(["model", "accuracy", "parameters (M)", "MACs (M)", *times], rows)


def _exit_tables(report: Report, exits: dict[str, Any]) -> None:
    """Who leaves where under each wish, and what other rules would do."""
    for name, point in exits["points"].items():
        report.text(
            f"{name}: threshold {threshold_text(point['threshold'])} on {exits['policy']}, mean "
            f"cost {100 * point['macs_fraction']:.1f} % of a run to the final head."
        )
        report.table(
            ["exit", "leave here", "right of those", "right of all", "ECE", "MACs (M)"],
            [
                [
                    "final" if row["block"] is None else f"block {row['block']}",
                    *(row[key] for key in ("rate", "accuracy", "accuracy_all", "ece")),
                    row["macs"] / 1e6,
                ]
                for row in point["exits"]
            ],
        )
    report.text(
        "Other rules on the same network, each with the balanced threshold that calibration data "
        "give it (exits chosen after a full pass):"
    )
    report.table(
        ["rule", "threshold", "accuracy", "MACs (M)", "share of MACs"],
        [
            [
                kind,
                threshold_text(row["threshold"]),
                row["accuracy"],
                row["macs"] / 1e6,
                row["macs_fraction"],
            ]
            for kind, row in exits["policies"].items()
        ],
    )


def _exit_figures(report: Report, run: Run, judged: Judgement) -> None:
    report.figure(
        plots.exit_rates(run.folder, judged.per_class, run.data.classes, judged.exits),
        "Where each class leaves, balanced thresholds.",
    )
    probabilities = judged.test.probabilities(judged.policy)
    report.figure(
        plots.reliability(run.folder, probabilities, judged.test.labels, judged.exits),
        "Reliability of each exit after its temperature.",
    )
    report.figure(
        plots.samples_per_exit(run.folder, *_sheet(run, judged), judged.exits),
        "Test images by the exit at which they leave, balanced thresholds.",
    )


def _sheet(run: Run, judged: Judgement) -> tuple[list[list[np.ndarray]], list[list[str]]]:
    """Test images that leave at each exit under the balanced policy, correct ones not preferred."""
    predicted, left, labels = judged.real[DEFAULT_POINT]
    images, classes = run.data.image_set("test"), run.data.classes
    rng = np.random.default_rng(0)
    pictures, captions = [], []
    for index in range(len(judged.exits) + 1):
        rows = rng.permutation(np.flatnonzero(left == index))[:SAMPLES]
        pictures.append([datasets.decode(images.paths[row]) for row in rows])  # type: ignore[index]
        said = [
            "" if predicted[row] == labels[row] else f"\n(said {classes[predicted[row]]})"
            for row in rows
        ]
        captions.append([classes[labels[row]] + tail for row, tail in zip(rows, said, strict=True)])
    return pictures, captions
