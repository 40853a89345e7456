"""What a run leaves for a reader: the record, ``report.md`` and one page with its plots."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from gfnet_dynn import plots
from gfnet_dynn.stages import Run
from shared_core import datasets
from shared_core.runs import Report, read_metrics, write_result

SAMPLES = 8  # images an exit on the sheet
NOT_REPRODUCED = "rehearsal on built-in data: this is not a reproduction of any published number"


def headline(run: Run) -> str:
    """The line that says what was run on what; a run's first and last."""
    facts = run.data.facts()
    what = (
        f"gfnet_dynn, scale {run.args.scale}: {facts['name']} ({facts['kind']}), "
        f"{facts['images']} images, {len(run.data.classes)} classes, {facts['pixels']} px, "
        f"split {run.data.manifest.hash[:12]}"
    )
    if run.data.kind != "built-in":
        return what
    wanted = "" if run.args.known_set is False else f"; {run.args.data_set} was not used"
    return f"REHEARSAL - {what}{wanted}. {NOT_REPRODUCED[0].upper()}{NOT_REPRODUCED[1:]}."


def write_record(
    run: Run, measured: dict[str, Any], *, command: str, started: datetime, seconds: float
) -> dict[str, Any]:
    """``result.json``."""
    task = f"gfnet_dynn/{run.args.data_set.lower()}"
    return write_result(
        run.folder / "result.json",
        task=task,
        command=command,
        scale=run.args.scale,
        data=run.data.facts(),
        seeds=[run.args.seed],
        measured=measured,
        started=started,
        wall_seconds=seconds,
    )


def _threads(environment: dict[str, Any]) -> str:
    count = environment["threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def _sheet(run: Run, drawn: dict[str, Any]) -> tuple[list[list[np.ndarray]], list[list[str]]]:
    """Test images that leave at each exit under the balanced policy, correct ones not preferred."""
    predicted, left, labels = drawn["real"]["balanced"]
    images, classes = run.data.image_set("test"), run.data.classes
    rng = np.random.default_rng(0)
    pictures, captions = [], []
    for index in range(len(drawn["exits"]) + 1):
        rows = rng.permutation(np.flatnonzero(left == index))[:SAMPLES]
        pictures.append([datasets.decode(images.paths[row]) for row in rows])  # type: ignore[index]
        said = [
            "" if predicted[row] == labels[row] else f"\n(said {classes[predicted[row]]})"
            for row in rows
        ]
        captions.append([classes[labels[row]] + tail for row, tail in zip(rows, said, strict=True)])
    return pictures, captions


def write_report(run: Run, record: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Draw the plots and write both forms of the report."""
    measured, folder = record["measured"], run.folder
    exits = measured["exits"]
    report = Report(f"GFNet with early exits on {run.data.name}")
    (report.note if run.data.kind == "built-in" else report.text)(headline(run))
    for note in run.data.notes:
        report.text(f"Differs from the published set: {note}.")
    environment = record["environment"]
    hardware = environment["gpu"] or f"{environment['cpu']}, {_threads(environment)}"
    report.text(
        f"Measured on {hardware} with torch {environment['packages'].get('torch')}, "
        f"trained in {run.precision}, evaluated in fp32, seed {run.args.seed}, "
        f"{record['wall_seconds'] / 60:.1f} minutes. Command: {record['command']}"
    )

    report.heading("Result on the test split")
    rows: list[list[object]] = []
    for name, label in (
        ("plain", "plain features, linear"),
        ("engineered", "engineered features, linear"),
    ):
        if "floor" in measured:
            rows.append([label, measured["floor"][name], None, None, None, None])
    for name in ("backbone", "student"):
        if name in measured:
            row = measured[name]
            rows.append(
                [
                    name,
                    row["accuracy"],
                    row["parameters"] / 1e6,
                    row["macs"] / 1e6,
                    *row["ms_per_image"].values(),
                ]
            )
    rows.append(
        [
            "with exits, nobody leaves",
            exits["final_accuracy"],
            exits["parameters"] / 1e6,
            exits["macs_per_exit"][-1] / 1e6,
            *exits["ms_per_image_without_exits"].values(),
        ]
    )
    for name, point in exits["points"].items():
        rows.append(
            [
                f"with exits, {name}",
                point["accuracy"],
                exits["parameters"] / 1e6,
                point["macs"] / 1e6,
                *point["ms_per_image"].values(),
            ]
        )
    labels = [f"ms an image, {label}" for label in exits["ms_per_image_without_exits"]]
    report.table(["model", "accuracy", "parameters (M)", "MACs (M)", *labels], rows)
    report.text(
        "Thresholds were fitted on the calibration split: careful loses nothing there against the "
        f"final head, balanced at most {run.args.max_accuracy_loss:g}, fast spends half the MACs. "
        "Accuracies of the exits are from passes in which samples really leave; times are medians "
        "over rounds in which all models take turns, of a GPU on the clock, of a CPU the time that "
        "one thread computes; decoding is not included."
    )
    if "floor" in measured and "backbone" in measured:
        lead = measured["backbone"]["accuracy"] - measured["floor"]["plain"]
        strong = measured["backbone"]["accuracy"] - measured["floor"]["engineered"]
        report.text(
            f"The backbone is {100 * abs(lead):.1f} points {'above' if lead > 0 else 'BELOW'} the "
            f"plain-features floor and {100 * abs(strong):.1f} points "
            f"{'above' if strong > 0 else 'BELOW'} the engineered-features floor."
        )
    report.figure(
        plots.accuracy_cost(folder, measured, drawn["sweep"], drawn["other_sweeps"]),
        "Accuracy against MACs.",
    )
    unit = "GPU" if environment["gpu"] else "CPU, 1 thread"
    report.figure(
        plots.accuracy_time(folder, measured, unit=unit), "Accuracy against measured time."
    )

    report.heading("The exits")
    for name, point in exits["points"].items():
        report.text(
            f"{name}: threshold {point['threshold']:.4g} on {exits['policy']}, mean cost "
            f"{100 * point['macs_fraction']:.1f} % of a run to the final head."
        )
        report.table(
            ["exit", "leave here", "right of those", "right of all", "ECE", "MACs (M)"],
            [
                [
                    "final" if e["block"] is None else f"block {e['block']}",
                    e["rate"],
                    e["accuracy"],
                    e["accuracy_all"],
                    e["ece"],
                    e["macs"] / 1e6,
                ]
                for e in point["exits"]
            ],
        )
    report.text(
        "Other rules on the same network, each with the balanced threshold that calibration data "
        "give it (exits chosen after a full pass):"
    )
    report.table(
        ["rule", "threshold", "accuracy", "MACs (M)", "share of MACs"],
        [
            [kind, row["threshold"], row["accuracy"], row["macs"] / 1e6, row["macs_fraction"]]
            for kind, row in exits["policies"].items()
        ],
    )
    report.figure(
        plots.exit_rates(folder, drawn["per_class"], run.data.classes, drawn["exits"]),
        "Where each class leaves, balanced thresholds.",
    )
    probabilities = drawn["test"].probabilities(drawn["policy"])
    report.figure(
        plots.reliability(folder, probabilities, drawn["test"].labels, drawn["exits"]),
        "Reliability of each exit after its temperature.",
    )
    report.figure(
        plots.samples_per_exit(folder, *_sheet(run, drawn), drawn["exits"]),
        "Test images by the exit at which they leave, balanced thresholds.",
    )
    report.heading("Training")
    log = folder / "metrics.jsonl"  # none where a model from elsewhere was evaluated
    lines = read_metrics(log) if log.exists() else []
    report.figure(plots.training_curves(folder, lines, drawn["exits"]), "Curves by epoch.")
    report.write(folder)
