"""What an evaluation leaves: tables, pictures, the list of mistakes, a report."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.datasets.finding.quarantine import write_text
from shared_core.metrics import classification_report
from shared_core.runs import Report
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.applications.test import Outputs
from torch_cls_zoo.utils.fonts import lacking_font
from torch_cls_zoo.utils.pictures import confusion_picture, write_picture
from torch_cls_zoo.utils.tensorboard_log import prediction_sheet

SHOWN_MISTAKES = 24


def mistakes(outputs: Outputs, probabilities: np.ndarray) -> list[int]:
    """Rows that are wrong, the surest first."""
    guesses = outputs.logits.argmax(axis=1)
    wrong = np.flatnonzero(guesses != outputs.labels)
    sure = probabilities[wrong, guesses[wrong]]
    return wrong[np.argsort(-sure, kind="stable")].tolist()


def write_tables(
    folder: Path,
    outputs: Outputs,
    probabilities: np.ndarray,
    classes: Sequence[str],
    confusion: Sequence[Sequence[int]],
) -> dict[str, Path]:
    """``per_class.csv``, ``misclassified.csv`` and ``misclassified.png``.

    Returns:
        The files by name; the picture is left out when nothing is wrong.
    """
    report = classification_report(np.asarray(confusion), classes, output_dict=True)
    rows = [["class", "precision", "recall", "f1", "images"]]
    for name in [*classes, "macro avg", "weighted avg"]:
        row = report[name]
        shares = [f"{row[key]:.6f}" for key in ("precision", "recall", "f1-score")]
        rows.append([name, *shares, str(int(row["support"]))])
    files = {"per_class": folder / "per_class.csv", "misclassified": folder / "misclassified.csv"}
    write_text(files["per_class"], _csv(rows))
    wrong, guesses = mistakes(outputs, probabilities), outputs.logits.argmax(axis=1)
    rows = [["path", "true", "predicted", "probability of predicted", "probability of true"]]
    paths = outputs.paths
    for row in wrong:
        true, guess = int(outputs.labels[row]), int(guesses[row])
        shares = [f"{probabilities[row, guess]:.6f}", f"{probabilities[row, true]:.6f}"]
        rows.append([paths[row], classes[true], classes[guess], *shares])
    write_text(files["misclassified"], _csv(rows))
    picture = folder / "misclassified.png"
    picture.unlink(missing_ok=True)
    if wrong:
        size = _shown_size(outputs)
        sheet = prediction_sheet(outputs, wrong[:SHOWN_MISTAKES], classes, size)
        files["picture"] = write_picture(picture, sheet)
    if outputs.unreadable:
        files["unreadable"] = folder / "unreadable.txt"
        write_text(files["unreadable"], "\n".join(outputs.unreadable) + "\n")
    return files


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _shown_size(outputs: Outputs) -> tuple[int, int]:
    """Of the pictures on the sheet: square, at most 160 pixels."""
    first = outputs.part.images.image(int(outputs.rows[0]))
    side = min(160, max(first.shape[:2]))
    return side, side


def write_report(
    session: Session,
    folder: Path,
    outputs: Outputs,
    probabilities: np.ndarray,
    values: Mapping[str, Any],
    *,
    title: str,
    training: Mapping[str, Any] | None = None,
    first: str | None = None,
) -> Path:
    """Tables, pictures and ``report.md`` / ``report.html`` of one evaluation; the page's path."""
    classes = session.classes
    files = write_tables(folder, outputs, probabilities, classes, values["confusion"])
    report = Report(title)
    if session.data.rehearsal:
        report.note("Drawn scenes stand in for images: this shows that the command works, no more.")
    if first is not None:
        report.text(f"{first[0].upper()}{first[1:]}.")
    rows = [[key, value] for key, value in values.items() if key != "confusion"]
    report.table(["measured on " + outputs.part.name, "value"], rows)
    if training:
        report.heading("Training")
        report.table(["what", "value"], [[key, value] for key, value in training.items()])
    report.heading("Classes")
    table = classification_report(np.asarray(values["confusion"]), classes, output_dict=True)
    report.table(
        ["class", "precision", "recall", "F1", "images"],
        [
            [
                n,
                *(table[n][k] for k in ("precision", "recall", "f1-score")),
                int(table[n]["support"]),
            ]
            for n in classes
        ],
    )
    try:
        picture = write_picture(
            folder / "confusion_matrix.png", confusion_picture(values["confusion"], classes)
        )
        report.figure(picture, "Confusion: rows are the true classes.")
    except ImportError:  # without matplotlib the table above still says it
        pass
    if (lacking := lacking_font(classes)) is not None:
        report.note(lacking)
    report.heading("Mistakes")
    wrong = len(outputs.rows) - round(values["accuracy"] * len(outputs.rows))
    report.text(f"{wrong} of {len(outputs.rows)} images, all listed in misclassified.csv.")
    if "picture" in files:
        report.figure(files["picture"], "The surest mistakes first.")
    if outputs.unreadable:
        report.note(f"{len(outputs.unreadable)} images could not be read; see unreadable.txt.")
    return report.write(folder)[1]
