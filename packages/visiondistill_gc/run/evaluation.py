"""After the folds: every image judged by the model that never saw it, and the folds together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.metrics import Confusion, classification_report, softmax, summarize
from shared_core.metrics.calibration import ece, nll
from shared_core.metrics.intervals import wilson_interval
from shared_core.runs.json_files import write_json, write_text
from visiondistill_gc.run.context import Run, predict
from visiondistill_gc.run.stages import load_teacher
from visiondistill_gc.utils.model_files import load_model
from visiondistill_gc.utils.prediction_files import load_predictions, save_predictions


def write_tables(folder: Path, name: str, matrix: np.ndarray, classes: Sequence[str]) -> str:
    """Confusion matrix as CSV and report as text and JSON; the text.

    Args:
        matrix: counts ``(C, C)``, rows are the true classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [",".join(["true \\ predicted", *classes])]
    rows += [",".join([c, *map(str, row)]) for c, row in zip(classes, matrix.tolist(), strict=True)]
    write_text(folder / f"{name}_confusion.csv", "\n".join(rows) + "\n")
    text = classification_report(matrix, classes, digits=4)
    write_text(folder / f"{name}_report.txt", text)
    table = classification_report(matrix, classes, output_dict=True)
    write_json(folder / f"{name}_report.json", table)
    return text


def _confusion(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    confusion = Confusion(probs.shape[1])
    confusion.update(probs, labels)
    return confusion.result()


def _summary(values: Sequence[float]) -> dict[str, Any]:
    found = summarize(list(values))
    return {"mean": found.mean, "std": found.std, "runs": found.n, "values": list(values)}


def out_of_fold(run: Run) -> dict[str, Any]:
    """Summary over the folds that were run, from the predictions they left."""
    classes, folder, folds = run.data.classes, run.folder / "predictions", run.settings.run.folds
    parts = [load_predictions(folder / f"fold{fold}.npz") for fold in folds]
    probs = np.concatenate([part.probs for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    keys = [key for part in parts for key in part.keys]
    save_predictions(folder / "out_of_fold.csv", probs, labels, keys, class_names=classes)
    matrix = _confusion(probs, labels)
    text = write_tables(run.folder / "tables", "out_of_fold", matrix, classes)
    for fold, part in zip(folds, parts, strict=True):
        own = _confusion(part.probs, part.labels)
        write_tables(run.folder / "tables", f"fold{fold}", own, classes)
    run.log.say(f"{run.validated}:\n{text}")
    by_fold = [float((p.probs.argmax(axis=1) == p.labels).mean()) for p in parts]
    return {
        "folds": list(folds),
        "accuracy": _summary(by_fold),
        "pooled_accuracy": float((probs.argmax(axis=1) == labels).mean()),
        "images": len(labels),
        "confusion": matrix.tolist(),
        "nll": nll(probs, labels),
        "ece": ece(probs, labels),
    }


def held_out(run: Run) -> dict[str, Any] | None:
    """The folds' models, their mean, the one they taught, their teachers: on images none saw."""
    images = run.data.test
    if images is None:
        return None
    folds, labels = run.settings.run.folds, images.labels
    every = [predict(run, load_model(run.student_file(fold)).net, images) for fold in folds]
    alone, tables = [one.accuracy for one in every], [softmax(one.logits) for one in every]
    mean = np.mean(tables, axis=0)
    matrix = _confusion(mean, labels)
    text = write_tables(run.folder / "tables", "ensemble", matrix, run.data.classes)
    save_predictions(
        run.folder / "predictions" / "ensemble_test.npz",
        mean,
        labels,
        [Path(p).name for p in images.paths or []],
        class_names=run.data.classes,
    )
    who = f"ensemble of {len(alone)} folds" if len(alone) > 1 else "student"
    run.log.say(f"{who} on held-out images:\n{text}")
    found: dict[str, Any] = {
        "images": len(labels),
        "students": _summary(alone),
        "ensemble": {
            "accuracy": float((mean.argmax(axis=1) == labels).mean()),
            "nll": nll(mean, labels),
            "ece": ece(mean, labels),
        },
        "confusion": matrix.tolist(),
    }
    if run.settings.run.one_student:
        one = predict(run, load_model(run.student_file(None)).net, images)
        probs = softmax(one.logits)
        path = run.folder / "predictions" / "one_test.npz"
        names = [Path(p).name for p in images.paths or []]
        save_predictions(path, probs, labels, names, class_names=run.data.classes)
        write_tables(run.folder / "tables", "one", _confusion(probs, labels), run.data.classes)
        low, high = wilson_interval(int((probs.argmax(axis=1) == labels).sum()), len(labels))
        found["one"] = {"accuracy": one.accuracy, "low": low, "high": high,
                        "nll": nll(probs, labels), "ece": ece(probs, labels)}  # fmt: skip
    if run.teacher_runs:
        own = folds[:1] if run.settings.teacher.teacher_weights else folds
        found["teachers"] = _summary(
            [predict(run, load_teacher(run, fold).net, images).accuracy for fold in own]
        )
    return found
