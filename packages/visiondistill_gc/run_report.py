"""What a run leaves for a reader: the record, ``report.md`` and one page with its plots."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from shared_core.metrics.predictions import load_predictions
from shared_core.runs import Report, read_metrics, write_result
from visiondistill_gc import plots
from visiondistill_gc.run_context import Run

NOT_REPRODUCED = "rehearsal on built-in data: this is not a reproduction of any published number"
WRONG_SHOWN = 12


def headline(run: Run) -> str:
    """The line that says what was run on what; a run's first and last."""
    facts = run.data.facts()
    what = (
        f"visiondistill_gc, scale {run.args.scale}: {facts['name']} ({facts['kind']}), "
        f"{facts['images']} images, {len(run.data.classes)} classes, {facts['pixels']} px, "
        f"{run.args.n_splits} folds, split {facts['split_hash'][:12]}"
    )
    if not run.data.prepared.rehearsal:
        return what
    return f"REHEARSAL - {what}. {NOT_REPRODUCED[0].upper()}{NOT_REPRODUCED[1:]}."


def teacher_facts(run: Run) -> dict[str, Any]:
    """Who taught, and what is known of it; an untrained head is called so."""
    args = run.args
    if args.alpha == 1:
        return {"kind": "none"}
    if args.teacher_knowledge is not None:
        about = (run.log.done("prepare") or {}).get("knowledge", {})
        return {"kind": "stored answers", **about}
    own = [run.log.stages[f"teacher{fold}"] for fold in args.folds]
    trained = all(result["trained"] for result in own)
    return {
        "kind": "given file" if args.teacher_weights else "trained on each fold's training part",
        "name": args.teacher,
        "head": "trained" if trained else "UNTRAINED",
        "validation_accuracy": [result["accuracy"] for result in own],
        "mixup": "the teacher sees the mixed images",
    }


def write_record(
    run: Run, measured: dict[str, Any], *, command: str, started: datetime, seconds: float
) -> dict[str, Any]:
    """``result.json``."""
    return write_result(
        run.folder / "result.json",
        task=f"visiondistill_gc/{run.args.data_set.lower()}",
        command=command,
        scale=run.args.scale,
        data=run.data.facts(),
        seeds=sorted({run.args.seed, *run.args.compare_seeds}),
        measured=measured,
        started=started,
        wall_seconds=seconds,
    )


def _runs(found: dict[str, Any]) -> list[object]:
    return [found["mean"], found["std"], found["runs"]]


def write_report(run: Run, record: dict[str, Any]) -> None:
    """Draw the plots and write both forms of the report."""
    measured, folder, args = record["measured"], run.folder, run.args
    report = Report(f"Garbage classification on {run.data.prepared.name}")
    (report.note if run.data.prepared.rehearsal else report.text)(headline(run))
    for note in run.data.prepared.notes:
        report.text(f"Differs from the published set: {note}.")
    environment = record["environment"]
    report.text(
        f"Measured on {environment['gpu'] or environment['cpu']} with paddlepaddle "
        f"{environment['packages'].get('paddlepaddle')}, {args.threads} threads, seed {args.seed}, "
        f"{record['wall_seconds'] / 60:.1f} minutes. Command: {record['command']}"
    )
    teacher = measured["teacher"]
    if teacher.get("head") == "UNTRAINED":
        report.note("The teacher's head is untrained: its answers are noise. It was asked for.")

    report.heading("Result")
    folds, test = measured["out_of_fold"], measured.get("test")
    floor = measured.get("floor", {}).get("plain")
    rows: list[list[object]] = []
    if "floor" in measured:
        rows += [
            ["held out", "plain features, linear (floor)", floor, None, None],
            [
                "held out",
                "engineered features, linear",
                measured["floor"]["engineered"],
                None,
                None,
            ],
        ]
    if test:
        if "teachers" in test:
            rows.append(["held out", "teachers", *_runs(test["teachers"])])
        rows.append(["held out", "students, one a fold", *_runs(test["students"])])
        count = len(folds["folds"])
        rows.append(["held out", f"ensemble of {count}", test["ensemble"]["accuracy"], None, None])
    rows.append(["out of fold", "students", *_runs(folds["accuracy"])])
    report.table(["images", "model", "accuracy", "deviation", "runs"], rows)
    report.text(
        "Out of fold: each image is judged by the model whose training part lacks it. That model's "
        "epoch was chosen on the same images, so this number is a little too good; held-out images "
        "chose nothing. Teachers were trained on their fold's training part alone, last epoch kept."
    )
    if test and floor is not None:
        lead = 100 * (test["ensemble"]["accuracy"] - floor)
        report.text(
            f"The ensemble is {abs(lead):.1f} points {'above' if lead > 0 else 'BELOW'} the floor."
        )
    report.text(
        f"Student: {measured['parameters']['total'] / 1e6:.2f} M parameters, "
        f"{measured['parameters']['trainable'] / 1e6:.2f} M of them trained. "
        f"Teacher: {teacher.get('name', '')} {teacher['kind']}"
        + (f", head {teacher['head']}." if "head" in teacher else ".")
    )
    pooled = load_predictions(folder / "predictions" / "out_of_fold.csv")
    classes = run.data.classes
    matrix = np.array(folds["confusion"])
    report.figure(
        plots.confusion(folder / "out_of_fold_confusion.png", matrix, classes),
        "Out-of-fold confusion matrix.",
    )
    report.figure(
        plots.precision_recall(folder / "out_of_fold_pr.png", pooled.probs, pooled.labels, classes),
        "Precision and recall of each class, out of fold.",
    )
    if test:
        report.figure(
            plots.confusion(
                folder / "ensemble_confusion.png", np.array(test["confusion"]), classes
            ),
            "Confusion matrix of the ensemble on held-out images.",
        )
    _wrong_images(run, report, pooled)

    if "comparison" in measured:
        _comparison(run, report, measured["comparison"], floor)
    report.heading("Training")
    lines = read_metrics(folder / "metrics.jsonl")
    students = [f"fold{fold}" for fold in folds["folds"]]
    teachers = sorted({str(x["stage"]) for x in lines if str(x["stage"]).startswith("teacher")})
    for name, stages in (("students", students), ("teachers", teachers)):
        if stages:
            picture = plots.training_curves(folder / f"curves_{name}.png", lines, stages)
            report.figure(picture, f"Curves by epoch, {name}.")
    preview = folder / "augmentations.png"
    if preview.exists():
        report.figure(preview, "Left: as evaluation sees an image. Right: training views of it.")
    report.write(folder)


def _comparison(run: Run, report: Report, found: dict[str, Any], floor: float | None) -> None:
    where = "held-out images" if found["judged_on"] == "test" else "one fold's validation images"
    report.heading("What distillation, Mixup and the teacher are worth")
    report.text(
        f"{found['epochs']} epochs, last one kept, {len(found['seeds'])} seeds, judged on "
        f"{found['images']} {where}. All arms of a seed begin with the same weights and see the "
        f"same views. The right teacher knows {100 * found['teachers']['right']:.1f} % of them, "
        f"with a random head {100 * found['teachers']['random_head']:.1f} %."
    )
    arms = found["arms"]
    report.table(
        ["arm", "accuracy", "deviation"],
        [[name, row["mean"], row["std"]] for name, row in arms.items()],
    )
    if found["differences"]:
        report.table(
            ["paired difference", "mean", "95 % from", "to", "seeds better"],
            [
                [name, row["mean"], row["low"], row["high"], f"{row['wins']} of {row['seeds']}"]
                for name, row in found["differences"].items()
            ],
        )
    picture = plots.bars(
        run.folder / "comparison.png",
        list(arms),
        [row["values"] for row in arms.values()],
        floor=floor if found["judged_on"] == "test" else None,
    )
    report.figure(picture, "Accuracy of the arms; a dot is a seed.")


def _wrong_images(run: Run, report: Report, pooled: Any) -> None:
    """The surest mistakes, with what was said."""
    said = pooled.probs.argmax(axis=1)
    sure = pooled.probs.max(axis=1)
    wrong = np.flatnonzero(said != pooled.labels)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:WRONG_SHOWN]
    if not len(wrong):
        report.text("No image was judged wrongly.")
        return
    rows = {entry.path: row for row, entry in enumerate(run.data.entries)}
    classes = run.data.classes
    pictures = [run.data.images.image(rows[pooled.keys[i]]) for i in wrong]
    captions = [
        f"{classes[pooled.labels[i]]}\nsaid {classes[said[i]]} {sure[i]:.2f}" for i in wrong
    ]
    half = (len(pictures) + 1) // 2
    path = plots.sheet(
        run.folder / "mistakes.png",
        [pictures[:half], pictures[half:]] if len(pictures) > 1 else [pictures],
        [captions[:half], captions[half:]] if len(pictures) > 1 else [captions],
    )
    report.figure(path, "The surest mistakes, out of fold.")
