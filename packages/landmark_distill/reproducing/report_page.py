"""The report of a reproduction: arms, paired differences, ROC, nearest neighbours, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from landmark_distill.gallery.features import FEATURE_FILE, load_features
from landmark_distill.images.landmark_data import LandmarkData
from landmark_distill.judging.judge import nearest_sheet
from landmark_distill.judging.pictures import plot_roc
from landmark_distill.judging.trained_features import NAME
from landmark_distill.judging.verification import Verification
from landmark_distill.reproducing.settings import ARMS, METRICS, TEACHER
from shared_core.checkpoints import atomic_write
from shared_core.runs import Report
from shared_core.trials import Difference, Trials, add_arms, add_differences, verdict

ROC, SHEET, CURVES = "roc.png", "nearest.png", "training.png"


def write_report(
    folder: Path,
    record: Mapping[str, Any],
    data: LandmarkData,
    trials: Trials,
    paired: Mapping[str, Mapping[str, Difference]],
    floor: Mapping[str, Any],
    headline: str,
) -> None:
    """Draw the pictures and write ``report.md`` and ``report.html``.

    Args:
        folder: of the sweep.
        record: of the sweep.
        paired: differences by pair and number.
        floor: the ROC of plain image features, see ``comparison.curve``.
        headline: the line that says what was run on what.
    """
    recipe = record["task"].split("/")[1]
    report = Report(f"landmark_distill: {recipe} through a shared frozen head")
    _say_what(report, record, data, headline)
    shown = {label: name for name, label in METRICS.items() if name in next(iter(paired.values()))}
    report.heading("Unseen classes")
    add_arms(report, trials, shown, first="network")
    plain = record["measured"]["floor"]
    said = (f"{label} {plain[name]:.4f}" for label, name in shown.items())
    report.text(f"Plain image features, without a network: {', '.join(said)}.")
    trained = record["measured"].get("trained_features")
    if trained:
        said = (f"{label} {trained[name]:.4f}" for label, name in shown.items() if name in trained)
        report.text(f"{NAME.capitalize()} ({trained['network']} as it is): {', '.join(said)}.")
    arms = [name for name in trials.names if name != TEACHER]
    report.text(
        "VR is the verification rate: genuine pairs accepted at a share of accepted impostor pairs "
        "(FAR), over all pairs of the test images. Students, mean and sample deviation over seeds: "
        + "; ".join(f"{arm} has {ARMS[arm].label}" for arm in arms)
        + ". All see the same augmented views; their weights and the order differ by seed."
    )
    report.heading("Paired differences")
    name = "vr_0.01" if "vr_0.01" in shown.values() else next(iter(shown.values()))
    main = [gaps[name] for gaps in paired.values()]
    report.text(f"{METRICS[name]}:")
    add_differences(report, main, verdicts=[verdict(gap) for gap in main])
    report.text("All numbers, in points, with the ends of the interval:")
    lines = [[pair, *[_short(gaps[n]) for n in shown.values()]] for pair, gaps in paired.items()]
    report.table(["", *shown], lines)
    _pictures(report, folder, data, trials, floor)
    report.heading("Training")
    _training(report, folder, trials)
    report.write(folder)


def verdicts(measured: Mapping[str, Any], first: str) -> list[str]:
    """Whether the distilled student is above trained features, and whether its teacher helped.

    Args:
        measured: of the record: arms, paired differences, perhaps trained features.
        first: the arm that is judged.
    """
    said, floor = [], measured.get("trained_features", {})
    for name in ("vr_0.01", "recall_at_1"):
        found = measured["arms"][first].get(name)
        if found is None:
            continue
        if name in floor:
            side = "above" if found["mean"] > floor[name] else "BELOW"
            side = "equal to" if found["mean"] == floor[name] else side
            said.append(
                f"{METRICS[name]} of the distilled student {found['mean']:.4f}, {side} {NAME} "
                f"({floor[name]:.4f})."
            )
        gap = measured["paired"].get(f"{first} - none", {}).get(name)
        if gap:
            said.append(_helped(gap, METRICS[name]))
    return said


def _helped(gap: Mapping[str, Any], label: str) -> str:
    low, high = gap["low"], gap["high"]
    helped, interval = "did not help for sure", "one seed"
    if low is not None:
        interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {gap['n']} seeds"
        helped = "helped" if low > 0 else "did not help, it hurt" if high < 0 else helped
    return f"Distillation {helped} in {label}: {100 * gap['mean']:+.1f} points ({interval})."


def _say_what(report: Report, record: Mapping[str, Any], data: LandmarkData, headline: str) -> None:
    first = " ".join([headline, *record["measured"]["verdicts"]])
    (report.note if data.rehearsal else report.text)(first)
    environment = record["environment"]
    hardware = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    report.text(
        f"Measured on {hardware}, torch {environment['packages'].get('torch')}, seeds "
        f"{', '.join(map(str, record['seeds']))}, {record['wall_seconds'] / 60:.1f} minutes. "
        f"Command: {record['command']}"
    )
    for note in data.notes:
        hidden = note.startswith(("validation:", "test:"))
        report.text(f"Groups of classes that nobody learned, {note}." if hidden else f"{note}.")


def _short(gap: Difference) -> str:
    if gap.interval is None:
        return f"{100 * gap.mean:+.1f}"
    low, high = (100 * end for end in gap.interval)
    return f"{100 * gap.mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _pictures(
    report: Report,
    folder: Path,
    data: LandmarkData,
    trials: Trials,
    floor: Mapping[str, Any],
) -> None:
    curves = {"plain features": _curve(floor)}
    for name in trials.names:
        title = name if name == TEACHER else f"student, {ARMS[name].label}"
        curves[title] = _curve(trials.rows(name)[0]["curve"])
    plot_roc(folder / ROC, curves, title="Verification among unseen classes, first seed")
    report.figure(folder / ROC, "Genuine pairs accepted against impostor pairs accepted.")
    first = next(name for name in trials.names if name != TEACHER)
    features = folder / trials.rows(first)[0]["folder"] / FEATURE_FILE
    if features.exists():  # not where a job array left it elsewhere
        paths = [Path(path) for path in data.test.paths or []]
        rows = load_features(features)
        nearest_sheet(folder / SHEET, rows, paths, data.test.labels, queries=8, k=8)
        report.figure(
            folder / SHEET,
            f"Images of unseen classes and their nearest others by the student with "
            f"{ARMS[first].label}, first seed; green: the same class.",
        )


def _curve(plain: Mapping[str, Any]) -> Verification:
    rates, far = np.array(plain["rates"]), np.array(plain["far"])
    targets = tuple(plain["far_targets"])
    return Verification(targets, rates, np.full(len(rates), np.nan), far, 0, plain["impostor"])


def _training(report: Report, folder: Path, trials: Trials) -> None:
    """Curves of the held-out images of learned classes, and a line for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {TEACHER: "0.4", **{arm: f"C{n}" for n, arm in enumerate(ARMS)}}
    lines: list[list[object]] = []
    for name in trials.names:
        for number, (seed, one) in enumerate(
            zip(trials.seeds(name), trials.rows(name), strict=True)
        ):
            points: Sequence[Sequence[float]] = one["learning"]
            label = None if number else name
            axes.plot(*zip(*points, strict=True), color=colours[name], lw=1, label=label)
            measured = [one[key] for key in ("parameters", "best_epoch", "calibration_accuracy")]
            lines.append([f"{name}, seed {seed}", *measured, round(one["seconds"], 1)])
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(folder / CURVES, lambda scratch: figure.savefig(scratch, format="png"))
    report.figure(folder / CURVES, "Accuracy on held-out images of the learned classes by epoch.")
    columns = ["run", "parameters", "best epoch", "accuracy, learned classes", "seconds"]
    report.table(columns, lines)
