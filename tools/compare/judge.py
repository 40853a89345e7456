"""Judge every file that can be shipped: one evaluator, the same images, the file itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compare.asking import (
    ANSWERS_FILE,
    CALIBRATION,
    TEST,
    Answers,
    answers_digest,
    ask,
    check_classes,
    keep_answers,
    kept_answers,
    parts_of,
    stored_answers,
)
from compare.change import change, change_lines
from compare.choose import pack_bits, paired
from compare.contract import (
    CANDIDATES,
    CHECK_FILE,
    JOB_FILE,
    JUDGED_FILE,
    SPLIT_FILE,
    WINNER,
    Choice,
    ClassRow,
    DataCheck,
    Job,
    Judged,
    Mistake,
    Plan,
    Planned,
    Value,
    read,
    write,
)
from compare.forms import forms_of, open_form
from compare.latency import Timed, measure
from compare.unknown import describe, threshold_of
from shared_core.datasets import Manifest
from shared_core.deploy import evaluate as core
from shared_core.deploy.facts import FACTS_FILE, ModelError, ModelFacts, read_facts
from shared_core.deploy.inputs import load_files
from shared_core.deploy.predictor import Predictor
from shared_core.deploy.session import holds_int8

Say = Callable[[str], None]
MODEL = "model"
SAMPLE = 32  # views that time is measured with
CONFUSIONS, MISTAKES = 380, 24  # that are kept


def judge(folder: Path, check: DataCheck, plan: Plan, *, say: Say) -> list[Judged]:
    """Judge all candidates that are done; writes ``judged.json``.

    Raises:
        ValueError: none can be judged.
    """
    parts = parts_of(folder, check.root)
    device = "auto" if plan.shape == "cuda" else "cpu"
    rows: list[Judged] = []
    for planned in plan.candidates:
        place = folder / CANDIDATES / planned.name
        if not (place / JOB_FILE).is_file() or read(place / JOB_FILE, Job).state != "done":
            continue
        begin = time.monotonic()
        try:
            found = _candidate(
                place, planned, parts, root=Path(check.root), threads=plan.threads, device=device
            )
        except (ModelError, FileNotFoundError, ImportError, ValueError) as error:
            say(f"{planned.name} cannot be judged: {' '.join(str(error).split())}")
            continue
        rows += found
        said = ", ".join(f"{one.form} {one.calibration_accuracy:.4f}" for one in found)
        say(f"judged {planned.name}: {said} on calibration ({time.monotonic() - begin:.0f} s)")
    if not rows:
        raise ValueError("no candidate left a file that can be judged")
    rows = _timed(folder, rows, parts[CALIBRATION], plan, device)
    best = min(rows, key=lambda row: (-row.calibration_accuracy, row.order, row.bytes, row.name))
    rows = [
        row if row is best
        else replace(row, difference=_difference(folder, row, best, parts[TEST].labels))
        for row in rows
    ]  # fmt: skip
    write(folder / JUDGED_FILE, rows)
    return rows


def _candidate(
    place: Path,
    planned: Planned,
    parts: Mapping[str, core.Labelled],
    *,
    root: Path,
    threads: int,
    device: str,
) -> list[Judged]:
    facts = read_facts(place / MODEL)
    classes = parts[TEST].classes
    check_classes(facts, classes)
    forms = forms_of(facts)
    if not forms:
        raise ModelError(f"its files are for {', '.join(facts.files)}, of which none can be judged")
    digest = answers_digest(place / MODEL / FACTS_FILE, forms, parts)
    answers = kept_answers(place / ANSWERS_FILE, digest)
    if answers is None:
        answers = ask(place / MODEL, forms, parts, threads=threads, device=device)
        keep_answers(place / ANSWERS_FILE, answers, digest)
    return [_row(planned, facts, form, files, answers, parts, place, root)
            for form, files in forms.items()]  # fmt: skip


def _row(
    planned: Planned, facts: ModelFacts, form: str, files: tuple[str, ...], answers: Answers,
    parts: Mapping[str, core.Labelled], place: Path, root: Path,
) -> Judged:  # fmt: skip
    test, labels = parts[TEST], parts[TEST].labels
    given, top = answers[f"{form}/test"], answers[f"{form}/test_top"]
    right = answers[f"{form}/calibration"] == parts[CALIBRATION].labels
    numbers = core.classification(_judged(given, top, labels, len(test.classes)), test.classes)
    share, names = numbers["accuracy"], test.classes
    threshold = threshold_of(answers[f"{form}/calibration_top"])
    known = {f"{form}/{part}_top" for part in parts}
    strange = {name.removeprefix(f"{form}/").removesuffix("_top"): values
               for name, values in answers.items()
               if name.startswith(f"{form}/") and name.endswith("_top") and name not in known
               }  # fmt: skip
    agreement, notes = _agreement(facts, form, answers)
    peak = answers.get(f"{form}/memory")
    return Judged(
        candidate=planned.name, form=form, base=planned.base, seed=planned.seed,
        project=planned.project, title=planned.title, order=planned.order, files=tuple(files),
        input_size=facts.input_size, calibration_accuracy=float(right.mean()),
        accuracy=Value(share["value"], share["low"], share["high"]), difference=None,
        macro_f1=numbers["macro"]["f1"], ece=numbers["ece"], agreement=agreement,
        bytes=_bytes(place / MODEL, files),
        memory_mb=None if peak is None or np.isnan(peak) else round(float(peak), 2),
        latency={}, throughput=0.0, macs=_macs(facts, answers[f"{form}/calibration_exit"]),
        per_class=tuple(_class_row(row) for row in numbers["per_class"]),
        confusions=_confusions(numbers["confusion"], names),
        mistakes=_mistakes(given, top, test, root),
        unknown=describe(threshold, top, strange), right=pack_bits(right), notes=notes,
        int8=any(holds_int8(place / MODEL / name) for name in files),
    )  # fmt: skip


def _judged(
    given: npt.NDArray[Any], top: npt.NDArray[Any], labels: npt.NDArray[np.int64], classes: int
) -> core.Judged:
    """Classes and their probabilities as the core's evaluator takes them: the rest is 0."""
    values = np.zeros((len(given), classes), np.float32)
    values[np.arange(len(given)), given] = top
    return core.Judged(values, labels, None, [], np.empty((0, 1, 1, 3), np.uint8))


def _class_row(row: Mapping[str, Any]) -> ClassRow:
    support = row["recall"]["images"]
    precision = row["precision"] if row["predicted"] else None
    f1 = row["f1"] if row["predicted"] or support else None
    return ClassRow(row["class"], support, row["recall"]["value"], precision, f1)


def _confusions(matrix: list[list[int]], names: Sequence[str]) -> tuple[tuple[str, str, int], ...]:
    counts = np.array(matrix)
    np.fill_diagonal(counts, 0)
    pairs = np.argwhere(counts)
    order = np.argsort(-counts[tuple(pairs.T)], kind="stable")[:CONFUSIONS]
    return tuple((names[a], names[b], int(counts[a, b])) for a, b in pairs[order])


def _mistakes(
    given: npt.NDArray[Any], top: npt.NDArray[Any], test: core.Labelled, root: Path
) -> tuple[Mistake, ...]:
    names = test.classes
    wrong = np.flatnonzero(given != test.labels)
    surest = wrong[np.argsort(-top[wrong], kind="stable")][:MISTAKES]
    return tuple(
        Mistake(
            test.files[n].relative_to(root).as_posix(),
            names[test.labels[n]],
            names[given[n]],
            float(top[n]),
        )
        for n in surest
    )


def _agreement(
    facts: ModelFacts, form: str, answers: Answers
) -> tuple[float | None, tuple[str, ...]]:
    """Share of the trained network's classes, which its project measured when it exported."""
    kept = facts.measured.get("files", {}).get(form)
    if kept is not None:
        same = kept["agreement"]["same_class"]
        return (None if same is None else float(same)), ()
    source = form.replace("openvino-int8", "onnx-int8").replace("openvino", "onnx")
    if source == form or f"{source}/test" not in answers:
        return None, ()
    same = float((answers[f"{form}/test"] == answers[f"{source}/test"]).mean())
    return None, (f"the class that ONNX Runtime gives for {100 * same:.2f} % of the test images",)


def _macs(facts: ModelFacts, exits: npt.NDArray[Any]) -> float | None:
    """Multiply-accumulates an image; with exits the mean over the calibration images."""
    if facts.exits is not None and (exits >= 0).all():
        return float(np.asarray(facts.exits.costs)[exits].mean())
    macs = facts.costs.get("macs")
    return float(macs) if isinstance(macs, int | float) else None


def _difference(folder: Path, row: Judged, best: Judged, labels: npt.NDArray[np.int64]) -> Value:
    first, second = (
        stored_answers(folder, one.candidate)[f"{one.form}/test"] == labels for one in (row, best)
    )
    return paired(first, second)


def _timed(
    folder: Path, rows: Sequence[Judged], images: core.Labelled, plan: Plan, device: str
) -> list[Judged]:
    """The rows with the time of all of them, taken in one run on calibration images."""
    views: dict[str, npt.NDArray[np.uint8]] = {}
    timed = {}
    for row in rows:
        model = folder / CANDIDATES / row.candidate / MODEL
        predictor = open_form(model, row.form, threads=plan.threads, device=device)
        timed[row.name] = Timed(predictor.probabilities, _sample(predictor, images, views))
    alone = plan.threads == 1 and device == "cpu"
    clock = time.process_time if alone else time.perf_counter
    batches = sorted({1, 16, plan.batch})
    found = measure(timed, batches=batches, clock=clock, seed=plan.seed)
    return [replace(row, latency=found[row.name], throughput=1e3 / found[row.name]["16"]["p50"])
            for row in rows]  # fmt: skip


def _sample(
    predictor: Predictor, images: core.Labelled, views: dict[str, npt.NDArray[np.uint8]]
) -> npt.NDArray[np.uint8]:
    """Views of images from all over the part; networks with equal views share them."""
    key = str(sorted(predictor.facts.view.items()))
    if key not in views:
        step = max(1, len(images.files) // SAMPLE)
        files = images.files[::step][:SAMPLE]
        loaded = load_files(files, predictor.view, batch_size=SAMPLE, workers=2)
        views[key] = np.concatenate([one.images for one in loaded])
    return views[key]


def compare_with(folder: Path, old: Path, choice: Choice) -> list[str]:
    """What the winner changes against an older one, on this run's test images: lines to print.

    Args:
        old: a model folder, or the folder of a run that holds ``winner``.

    Raises:
        FileNotFoundError, ModelError: there is no model, or of other classes.
    """
    old = old / WINNER if (old / WINNER / FACTS_FILE).is_file() else old
    check = read(folder / CHECK_FILE, DataCheck)
    test = parts_of(folder, check.root)[TEST]
    facts = read_facts(old)
    check_classes(facts, test.classes)
    forms = forms_of(facts)
    if not forms:
        raise ModelError(f"{old} has no file that can be asked here")
    form = facts.default if facts.default in forms else next(iter(forms))
    answers = ask(old, [form], {TEST: test}, threads=1, memory=False)
    new = stored_answers(folder, choice.candidate)[f"{choice.form}/test"] == test.labels
    found = change(answers[f"{form}/test"] == test.labels, new, test)
    model = folder / CANDIDATES / choice.candidate / MODEL
    pair = {"old": open_form(old, form), "new": open_form(model, choice.form)}
    views: dict[str, npt.NDArray[np.uint8]] = {}
    times = measure({name: Timed(one.probabilities, _sample(one, test, views))
                     for name, one in pair.items()}, batches=(1,))  # fmt: skip
    sizes = [_bytes(old, forms[form]),
             _bytes(model, forms_of(read_facts(model))[choice.form])]  # fmt: skip
    return change_lines(old, facts, found, len(test.files), times, sizes, _learned(folder, old))


def _learned(folder: Path, old: Path) -> int | None:
    """How many of this run's test images the run of an older winner trained with."""
    if not (old.parent / SPLIT_FILE).is_file():
        return None
    before = {one.key for one in Manifest.read(old.parent / SPLIT_FILE).subset("train")}
    return sum(one.key in before for one in Manifest.read(folder / SPLIT_FILE).subset(TEST))


def _bytes(folder: Path, files: Sequence[str]) -> int:
    return sum((folder / name).stat().st_size for name in files)
