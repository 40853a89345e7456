"""What a run leaves for a reader: the record, ``report.md`` and one page with its plots."""

from __future__ import annotations

from typing import Any

import numpy as np

from shared_core.runs import Report, read_metrics, write_result
from shared_core.trials import add_arms, add_differences, draw_arms
from visiondistill_gc.run import plots
from visiondistill_gc.run.comparisons import differences_of, trials_of
from visiondistill_gc.run.context import Run
from visiondistill_gc.utils.prediction_files import load_predictions

NOT_REPRODUCED = "rehearsal on built-in data: this is not a reproduction of any published number"
FLOOR = "trained features, linear"
OUT_OF_FOLD, HELD_OUT = "out of fold", "on held-out images"
WRONG_SHOWN = 12


def headline(run: Run) -> str:
    """The line that says what was run on what; a run's first and last."""
    facts, scale = run.data.facts(), run.settings.run.scale
    folds = f"{n} folds" if (n := run.settings.data.n_splits) > 1 else "one student"
    what = (
        f"visiondistill_gc, scale {scale}: {facts['name']} ({facts['kind']}), "
        f"{facts['images']} images, {len(run.data.classes)} classes, {facts['pixels']} px, "
        f"{folds}, split {facts['split_hash'][:12]}"
    )
    if not run.data.prepared.rehearsal:
        return what
    return f"REHEARSAL - {what}. {NOT_REPRODUCED[0].upper()}{NOT_REPRODUCED[1:]}."


def judged_model(run: Run) -> str:
    """What the held-out images judge first: the folds together, or a single student."""
    folds = len(run.settings.run.folds)
    return f"ensemble of {folds}" if run.settings.data.n_splits > 1 else "student"


def teacher_facts(run: Run) -> dict[str, Any]:
    """Who taught, and what is known of it; an untrained head is called so."""
    if run.settings.training.alpha == 1:
        return {"kind": "none"}
    if not run.teacher_runs:
        about = (run.log.done("prepare") or {}).get("knowledge", {})
        return {"kind": "stored answers", **about}
    own = [run.log.stages[f"teacher{fold}"] for fold in run.settings.run.folds]
    options, trained = run.settings.teacher, all(result["trained"] for result in own)
    given = options.teacher_weights is not None
    return {
        "kind": "given file" if given else "trained on each fold's training part",
        "name": options.teacher,
        "head": "trained" if trained else "UNTRAINED",
        "validation_accuracy": [result["accuracy"] for result in own],
        "mixup": "the teacher sees the mixed images",
    }


def write_record(run: Run, measured: dict[str, Any], *, command: str) -> dict[str, Any]:
    """``result.json``."""
    what, seeds = run.settings.run, run.settings.records.compare_seeds
    return write_result(
        run.folder / "result.json",
        task=f"visiondistill_gc/{run.settings.data.data_set.lower()}",
        command=command,
        scale=what.scale,
        data=run.data.facts(),
        seeds=sorted({what.seed, *seeds}),
        measured=measured,
        started=run.opened.started,
        wall_seconds=run.opened.seconds,
    )


def write_report(run: Run, record: dict[str, Any]) -> None:
    """Draw the plots and write both forms of the report."""
    measured = record["measured"]
    report = Report(f"Garbage classification on {run.data.prepared.name}")
    _opening(run, report, record)
    report.heading("Result")
    _results(run, report, measured)
    report.text(_networks(run, measured))
    _pictures(run, report, measured)
    if "comparison" in measured:
        _comparison(run, report, measured["comparison"], _floor(measured))
    report.heading("Training")
    _curves(run, report, measured["out_of_fold"]["folds"])
    report.write(run.folder)


def _floor(measured: dict[str, Any]) -> float | None:
    return measured.get("floor", {}).get("plain")


def verdicts(measured: dict[str, Any]) -> list[str]:
    """Whether the result is above the floors, and whether distillation helped: whole sentences."""
    said, where = [], measured.get("validated", OUT_OF_FOLD)
    validated = measured["out_of_fold"]["pooled_accuracy"]
    trained, plain, test = (measured.get(k) for k in ("trained_floor", "floor", "test"))
    held = test["ensemble"]["accuracy"] if test else None
    if trained and test and where != OUT_OF_FOLD:  # a single student: its epoch was chosen there
        said.append(_against(held, trained["test"]["accuracy"], HELD_OUT, FLOOR))
    elif trained:
        said.append(_against(validated, trained["out_of_fold"]["accuracy"], where, FLOOR))
        if test and trained.get("test"):
            said.append(_against(held, trained["test"]["accuracy"], HELD_OUT, FLOOR))
    if test and "one" in test and trained:
        found, floor = test["one"]["accuracy"], trained["test"]["accuracy"]
        said.append("The one student: " + _against(found, floor, HELD_OUT, FLOOR))
    if plain:
        found, where = (held, HELD_OUT) if test else (validated, where)
        said.append(_against(found, max(plain.values()), where, "the best floor without a network"))
    gap = measured.get("comparison", {}).get("differences", {}).get("distilled - undistilled")
    if gap:
        low, high = gap["low"], gap["high"]
        helped = "did not help for sure"
        if low is not None and low > 0:
            helped = "helped"
        elif high is not None and high < 0:
            helped = "did not help, it hurt"
        interval = "one seed"
        if low is not None:
            interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {gap['n']} seeds"
        said.append(f"Distillation {helped}: {100 * gap['mean']:+.1f} points ({interval}).")
    return said


def _against(found: float, floor: float, where: str, name: str) -> str:
    side = "above" if found > floor else "BELOW" if found < floor else "equal to"
    return f"{found:.4f} {where}, {side} {name} ({floor:.4f})."


def _opening(run: Run, report: Report, record: dict[str, Any]) -> None:
    """On what, where, and what a reader must be warned of."""
    first = " ".join([headline(run), *verdicts(record["measured"])])
    (report.note if run.data.prepared.rehearsal else report.text)(first)
    for note in run.data.prepared.notes:
        report.text(f"Of the data: {note}.")
    environment = record["environment"]
    report.text(
        f"Measured on {environment['gpu'] or environment['cpu']} with paddlepaddle "
        f"{environment['packages'].get('paddlepaddle')}, {run.threads} threads, seed "
        f"{run.settings.run.seed}, {record['wall_seconds'] / 60:.1f} minutes. "
        f"Command: {record['command']}"
    )
    if record["measured"]["teacher"].get("head") == "UNTRAINED":
        report.note("The teacher's head is untrained: its answers are noise. It was asked for.")


def _results(run: Run, report: Report, measured: dict[str, Any]) -> None:
    """The table of accuracies, and what each stands for."""
    folds, test, floor = measured["out_of_fold"], measured.get("test"), _floor(measured)
    rows: list[list[object]] = []

    def add(images: str, model: str, mean: float, std: object = None, runs: object = None) -> None:
        rows.append([images, model, mean, std, runs])

    if floor is not None:
        add("held out", "plain features, linear (floor)", floor)
        add("held out", "engineered features, linear", measured["floor"]["engineered"])
    trained = measured.get("trained_floor", {})
    for images in ("test", "out_of_fold"):
        if images in trained:
            where = "held out" if images == "test" else run.validated
            add(where, f"{FLOOR} ({trained['network']})", trained[images]["accuracy"])
    if test:
        for name, model in (("teachers", "teachers"), ("students", "students")):
            if name in test:
                found = test[name]
                add("held out", model, found["mean"], found["std"], found["runs"])
        if len(folds["folds"]) > 1:
            add("held out", judged_model(run), test["ensemble"]["accuracy"])
        if "one" in test:
            add("held out", "one student, taught by the folds' students", test["one"]["accuracy"])
    found = folds["accuracy"]
    add(run.validated, "students", found["mean"], found["std"], found["runs"])
    report.table(["images", "model", "accuracy", "deviation", "runs"], rows)
    what = "Validation: images that no training step saw. "
    if run.validated == OUT_OF_FOLD:
        what = "Out of fold: each image is judged by the model whose training part lacks it. "
    report.text(
        what
        + "The model's epoch was chosen on the same images, so this number is a little too good; "
        "held-out images chose nothing. Teachers learned from their student's training part alone, "
        "last epoch kept."
    )


def _networks(run: Run, measured: dict[str, Any]) -> str:
    """How large the student is, what it began with, who taught it."""
    size, teacher = measured["parameters"], measured["teacher"]
    starts = measured["start"]
    words = ". ".join(
        f"Initial weights of the {who}: {facts['name']}, licence {facts.get('licence')}, sha256 "
        f"{facts['sha256'][:12]}"
        for who, facts in starts.items()
    )
    return (
        f"Student: {run.settings.student.student}, {size['total'] / 1e6:.2f} M parameters, "
        f"{size['trainable'] / 1e6:.2f} M of them trained, from "
        + ("trained weights. " if "student" in starts else "nothing: no block is frozen. ")
        + f"Teacher: {teacher.get('name', '')} {teacher['kind']}"
        + (f", head {teacher['head']}. " if "head" in teacher else ". ")
        + (f"{words}." if words else "")
    )


def _pictures(run: Run, report: Report, measured: dict[str, Any]) -> None:
    """Confusion matrices, precision and recall, the surest mistakes."""
    folder, classes = run.folder, run.data.classes
    pooled = load_predictions(folder / "predictions" / "out_of_fold.csv")
    text = f"Confusion matrix, {run.validated}."
    matrices = [("out_of_fold", text, measured["out_of_fold"])]
    if "test" in measured:
        text = f"Confusion matrix of the {judged_model(run)} on held-out images."
        matrices.append(("ensemble", text, measured["test"]))
    for name, text, found in matrices:
        path = folder / f"{name}_confusion.png"
        report.figure(plots.confusion(path, np.array(found["confusion"]), classes), text)
    report.figure(
        plots.precision_recall(folder / "out_of_fold_pr.png", pooled.probs, pooled.labels, classes),
        f"Precision and recall of each class, {run.validated}.",
    )
    _wrong_images(run, report, pooled)


def _curves(run: Run, report: Report, folds: list[int]) -> None:
    """Losses and accuracies by epoch, and what the augmentation does."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    students = [f"fold{fold}" for fold in folds]
    teachers = sorted({str(x["stage"]) for x in lines if str(x["stage"]).startswith("teacher")})
    for name, stages in (("students", students), ("teachers", teachers)):
        if stages:
            picture = plots.training_curves(run.folder / f"curves_{name}.png", lines, stages)
            report.figure(picture, f"Curves by epoch, {name}.")
    preview = run.folder / "augmentations.png"
    if preview.exists():
        report.figure(preview, "Left: as evaluation sees an image. Right: training views of it.")


def _comparison(run: Run, report: Report, found: dict[str, Any], floor: float | None) -> None:
    """The arms side by side, and what they differ in."""
    on_test = found["judged_on"] == "test"
    where = "held-out images" if on_test else "one fold's validation images"
    report.heading("What distillation, Mixup and the teacher are worth")
    report.text(
        f"{found['epochs']} epochs, last one kept, {len(found['seeds'])} seeds, judged on "
        f"{found['images']} {where}. All arms of a seed begin with the same weights and see the "
        "same views."
    )
    if "teachers" in found:
        report.text(
            f"The right teacher knows {100 * found['teachers']['right']:.1f} % of them, with a "
            f"random head {100 * found['teachers']['random_head']:.1f} %."
        )
    trials = trials_of(run)
    add_arms(report, trials, {"accuracy": "accuracy"}, first="arm")
    add_differences(report, differences_of(trials))
    path = run.folder / "comparison.png"
    draw_arms(path, trials, "accuracy", label="accuracy", floor=floor if on_test else None)
    report.figure(path, "Accuracy of the arms; a dot is a seed.")


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
    report.figure(path, f"The surest mistakes, {run.validated}.")
