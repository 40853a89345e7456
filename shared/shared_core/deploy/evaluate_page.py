"""An evaluation for people: lines on the screen, ``evaluation.json``, ``report.md`` and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shared_core.runs.json_files import write_json
from shared_core.runs.report import Report
from shared_core.texts import say

FILE = "evaluation.json"
MOST_LINES = 30  # classes listed on the screen
MOST_PAIRS = 20  # confused pairs listed in the report


def with_interval(share: dict[str, Any]) -> str:
    """``0.9123 (95 %: 0.88 to 0.94) of 320 images``; a dash of none."""
    if share["value"] is None:
        return "- of 0 images"
    low, high = share["low"], share["high"]
    return f"{share['value']:.4f} (95 %: {low:.4f} to {high:.4f}) of {share['images']} images"


def headline(found: dict[str, Any]) -> list[str]:
    """The main numbers, a line each."""
    lines = []
    if found["task"] == "embed":
        lines.append(f"nearest neighbour: {with_interval(found['nearest'])}")
        lines.append(f"recall@1: {with_interval(found['recall_at_1'])}")
    else:
        macro = found["macro"]
        lines.append(f"accuracy: {with_interval(found['accuracy'])}")
        lines.append(
            f"macro over {macro['classes']} classes: recall {macro['recall']:.4f}, precision "
            f"{macro['precision']:.4f}, F1 {macro['f1']:.4f}"
        )
        lines.append(
            f"calibration: ECE {found['ece']:.4f}, mean confidence {found['mean_confidence']:.4f}"
        )
    if "unknown" in found:
        unknown = found["unknown"]
        lines.append(
            f"answered (at least {unknown['threshold']:g} sure): "
            f"{with_interval(unknown['answered'])}; of these right: "
            f"{with_interval(unknown['accuracy_of_answered'])}"
        )
    if "exits" in found:
        exits = found["exits"]
        shares = ", ".join(f"{one['exit']} {100 * one['share']:.1f} %" for one in exits["at"])
        lines.append(
            f"exits: {shares}; mean cost {exits['mean_macs'] / 1e6:.3g} M MACs, "
            f"{100 * exits['macs_fraction']:.1f} % of a full run"
        )
    if "against" in found:
        lines.append(against_line(found["against"]))
    for name, sizes in found.get("latency", {}).items():
        times = ", ".join(
            f"{one['cpu_ms']:.2f} ms an image at batch {size}" for size, one in sizes.items()
        )
        lines.append(f"time of the {name if name == 'model' else 'other'}: {times} (CPU time)")
    return lines


def against_line(against: dict[str, Any]) -> str:
    """How the other model compares, on one line."""
    head = f"against {against['model']} ({against['runtime']}): "
    if "cosine" in against:
        return head + (
            f"cosine of the features {against['cosine']:.6f}, at least "
            f"{against['smallest_cosine']:.6f}"
        )
    return head + (
        f"same class {with_interval(against['same_class'])}; its accuracy "
        f"{against['accuracy']['value']:.4f}; right alone: this {against['only_model_right']}, "
        f"the other {against['only_other_right']}; probabilities differ by at most "
        f"{against['largest_difference']:.2e}"
    )


def print_evaluation(found: dict[str, Any]) -> None:
    """The main numbers, then a line a class, the worst ones where there are many."""
    for line in headline(found):
        say(line)
    rows = [row for row in found.get("per_class", []) if row["recall"]["images"]]
    if len(rows) > MOST_LINES:
        rows = sorted(rows, key=lambda row: row["recall"]["value"])[:MOST_LINES]
        say(f"the {MOST_LINES} classes with the lowest recall:")
    width = max((len(row["class"]) for row in rows), default=0)
    for row in rows:
        recall = row["recall"]
        say(
            f"  {row['class']:<{width}}  recall {recall['value']:.3f} ({recall['low']:.3f} to "
            f"{recall['high']:.3f})  precision {row['precision']:.3f}  {recall['images']} images"
        )


def confused_pairs(found: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(true class, answered class, images), most first."""
    matrix = np.array(found["confusion"])
    np.fill_diagonal(matrix, 0)
    names = [row["class"] for row in found["per_class"]]
    order = np.argsort(-matrix, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [(int(at // len(names)), int(at % len(names))) for at in order]
    return [(names[a], names[b], int(matrix[a, b])) for a, b in pairs if matrix[a, b]]


def write_evaluation(folder: Path, found: dict[str, Any]) -> None:
    """Write ``evaluation.json``, ``report.md`` and ``report.html``.

    Raises:
        OSError: they cannot be written.
    """
    write_json(folder / FILE, found)
    report = Report(f"Evaluation of {found['architecture']} ({found['project']})")
    data = found["data"]
    where = f"part {data['part']}" if data["part"] else "all images"
    split = f", split {data['split_hash'][:12]}" if data["split_hash"] else ""
    report.text(f"{data['images']} images ({where}{split}), runtime {found['runtime']}.")
    if data["unreadable"]:
        report.note(f"{len(data['unreadable'])} images could not be read and were left out.")
    for line in headline(found):
        report.text(line)
    if "exits" in found:
        _add_exits(report, found["exits"])
    if "per_class" in found:
        _add_classes(report, found)
    report.write(folder)


def _add_exits(report: Report, exits: dict[str, Any]) -> None:
    report.heading("Exits")
    rows = [
        (one["exit"], one["share"], one["accuracy"]["value"], one["macs"]) for one in exits["at"]
    ]
    report.table(["exit", "share of images", "accuracy there", "MACs"], rows)


def _add_classes(report: Report, found: dict[str, Any]) -> None:
    report.heading("Classes")
    rows = []
    for row in found["per_class"]:
        recall = row["recall"]
        numbers = (recall["value"], recall["low"], recall["high"], row["precision"], row["f1"])
        rows.append((row["class"], *numbers, recall["images"]))
    report.table(["class", "recall", "low", "high", "precision", "F1", "images"], rows)
    if pairs := confused_pairs(found):
        report.heading("Most confused")
        report.table(["class", "answered as", "images"], pairs)
    names = [row["class"] for row in found["per_class"]]
    if len(names) <= MOST_LINES:
        report.heading("Confusion: rows are true classes, columns are answers")
        table = [(name, *line) for name, line in zip(names, found["confusion"], strict=True)]
        report.table(["", *names], table)
