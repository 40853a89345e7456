"""The chain: prepare, then teacher and student of each fold, evaluate, compare, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import paddle

from shared_core.datasets import EpochOrder
from shared_core.for_paddle.distributed import World, main_writes, start, stop
from shared_core.metrics.floor import floor_accuracy
from shared_core.runs import UsageError, open_run
from visiondistill_gc.models.teacher_model import teacher_names
from visiondistill_gc.options import PADDLECLAS, STAGES, Settings
from visiondistill_gc.run import plots
from visiondistill_gc.run.comparisons import cells_of, stage_of, summary, train_cell
from visiondistill_gc.run.context import Run
from visiondistill_gc.run.evaluation import held_out, out_of_fold
from visiondistill_gc.run.report import (
    headline,
    judged_model,
    teacher_facts,
    verdicts,
    write_record,
    write_report,
)
from visiondistill_gc.run.stages import (
    given_teacher,
    stored_teacher,
    train_student,
    train_teacher,
)
from visiondistill_gc.run.starting import (
    STUDENT,
    TEACHER,
    features_of,
    probes,
    started,
    trained_floor,
)
from visiondistill_gc.utils.data_utils import prepare, train_view

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = ("stage", "workers", "save_every", "data_root", "visualdl", "folds", "one_student")
NOT_IN_CONFIG = ("output", "log_dir", "save_dir")
JUDGED = ("out_of_fold", "test")
RUN_KEYS = ("scale", "teacher_engine", "n_splits")  # what tells a run of this command

Job = Callable[[], dict[str, Any]]


def run_recipe(settings: Settings, command: str) -> None:
    """Run the stages that the settings ask for; ``command`` is what the record says was typed."""
    if settings.start == "new" and settings.run.stage != "all":
        settings = replace(settings, start="continue")
    world = start(device=settings.run.device)
    try:
        _check(settings, world)
        config = {k: v for k, v in settings.plain().items() if k not in NOT_IN_CONFIG}
        with open_run(
            settings.run.output,
            {**config, "world_size": world.world_size},
            keys=RUN_KEYS,
            start=settings.start,
            may_differ=MAY_DIFFER,
            usual={"threads": 1},
            world=world,
            main_writes=main_writes,
        ) as opened:
            paddle.base.core.set_num_threads(opened.config["threads"])
            data = main_writes(lambda: prepare(settings, opened.folder), world)
            run = Run(settings, opened, data, world)
            run.log.say(headline(run))
            _stages(run, command)
            run.log.say(" ".join([headline(run), *_last_words(run)]))
    finally:
        stop()


def _last_words(run: Run) -> list[str]:
    """What the report found of floors and teaching; nothing before there is a report."""
    return list((run.log.done(f"report{run.evaluated}") or {}).get("verdicts", []))


def _check(settings: Settings, world: World) -> None:
    """Refuse, before anything is written, what only the framework and the machine tell."""
    training, teacher = settings.training, settings.teacher
    if training.amp != "fp32" and world.device.startswith("cpu"):
        raise UsageError(f"--amp {training.amp}: mixed precision needs a GPU, this run is on a CPU")
    asked = {}
    if settings.student.student_source != PADDLECLAS:
        asked["--student"] = settings.student.student
    if teacher.teacher_source != PADDLECLAS:
        asked["--teacher"] = teacher.teacher
    for flag, name in asked.items():
        if name not in teacher_names():
            raise UsageError(f"{flag} {name}: expected one of {', '.join(teacher_names())}")
    if training.batch_size % world.world_size or teacher.teacher_batch_size % world.world_size:
        raise UsageError(
            f"--batch-size {training.batch_size} and --teacher-batch-size "
            f"{teacher.teacher_batch_size}: expected multiples of {world.world_size} processes"
        )


def _stages(run: Run, command: str) -> None:
    """Do the stages in their order: all, or one whose forerunners are done."""
    asked = run.settings.run.stage
    for group, name, job in _jobs(run, command):
        if asked in ("all", group) or group == "prepare":
            run.opened.stage(name, job, state=run.folder / "state" / f"{name}.pdparams")
        elif STAGES.index(group) < STAGES.index(asked) and run.log.done(name) is None:
            raise UsageError(f"--stage {asked} needs {name} first: run --stage all")


def _jobs(run: Run, command: str) -> list[tuple[str, str, Job]]:
    """Stage of the command line, name, and what is done, in the order in which it is done."""
    folds = run.settings.run.folds
    jobs: list[tuple[str, str, Job]] = [("prepare", "prepare", lambda: _prepare(run, command))]
    for fold in folds:
        if run.teacher_runs:
            teach = given_teacher if run.settings.teacher.teacher_weights else train_teacher
            jobs.append(("folds", f"teacher{fold}", lambda f=fold, t=teach: t(run, f)))
        jobs.append(("folds", f"fold{fold}", lambda f=fold: train_student(run, f)))
    if run.settings.run.one_student:
        jobs.append(("one", "one", lambda: train_student(run, None)))
    names = run.evaluated
    jobs.append(("evaluate", f"evaluate{names}", lambda: _evaluate(run)))
    for cell in cells_of(run):
        jobs.append(("compare", stage_of(cell), lambda c=cell: train_cell(run, c)))
    jobs.append(("report", f"report{names}", lambda: _report(run, command)))
    return jobs


def _prepare(run: Run, command: str) -> dict[str, Any]:
    """Say what the data are, show augmented images, measure the floor."""
    data, settings, begun = run.data, run.settings, time.monotonic()
    result: dict[str, Any] = {"command": command}
    sizes = [len(data.validation_rows(fold)) for fold in range(settings.data.n_splits)]
    run.log.say(data.prepared.manifest.summary())
    parts = f"folds of {sizes} images" if len(sizes) > 1 else f"validated on {sizes[0]} images"
    run.log.say(f"{parts}, {data.groups} groups of copies kept together")
    result["start"] = main_writes(lambda: _look_at_starts(run), run.world)
    if settings.teacher.teacher_knowledge is not None and settings.training.alpha != 1:
        result["knowledge"] = _look_at_knowledge(run)
    if not run.world.is_main:
        return result
    _show_augmentations(run)
    if settings.records.floor:
        result["floor"] = _measure_floor(run)
        result["trained_floor"] = _measure_trained_floor(run)
    return {**result, "seconds": time.monotonic() - begun}


def _show_augmentations(run: Run) -> None:
    """Six images and six training views of each, as a picture and in VisualDL."""
    data, seed = run.data, run.settings.run.seed
    order = EpochOrder(len(data.images), seed=seed).indices()
    view = train_view(run.settings, seed=seed)
    lines = plots.augmentations(data.images, view, order[:6].tolist(), views=6)
    names = [["evaluation", *(f"view {n}" for n in range(6))]] * len(lines)
    plots.sheet(run.folder / "augmentations.png", lines, names)
    visual = run.visual("data")
    visual.begin("prepare", run.log)
    for number, line in enumerate(lines):
        visual.image("augmentation", np.concatenate(line, axis=1), step=number)
    visual.close()


def _measure_floor(run: Run) -> dict[str, float]:
    """What linear classifiers of image features reach on the images that judge."""
    data, train, test = run.data, run.data.images, run.data.test
    if test is None:
        train = data.images.subset(data.train_rows(0))
        test = data.images.subset(data.validation_rows(0))
    floor = floor_accuracy(train.paths, train.labels, test.paths, test.labels)
    run.log.say(
        f"floor without a network: {floor['plain']:.4f} with plain features, "
        f"{floor['engineered']:.4f} with engineered ones"
    )
    return floor


def _look_at_starts(run: Run) -> dict[str, Any]:
    """Where teacher and student start; the features that their heads start from are stored."""
    found = {}
    own = run.teacher_runs and run.settings.teacher.teacher_weights is None
    for who in (TEACHER, STUDENT) if own else (STUDENT,):
        net, facts = started(run, who)
        if not facts:
            run.log.say(f"the {who} starts from nothing, so no block is frozen (--init)")
            continue
        found[who], how = facts, "new"
        if facts["head"] != "new":
            how = "the file's"
        elif probes(run, who):
            features_of(run, net, facts)
            how = "that of a linear classifier of stored features"
        licence = facts.get("licence", "not known")
        run.log.say(f"the {who} starts from {facts['name']} (licence {licence}); its head is {how}")
    return found


def _measure_trained_floor(run: Run) -> dict[str, Any] | None:
    """What a line through trained features reaches, said and kept."""
    found = trained_floor(run)
    if found is None:
        run.log.say("no trained weights are installed, so trained features are no floor here")
        return None
    said = ", ".join(
        f"{found[name]['accuracy']:.4f} {name.replace('_', ' ')}"
        for name in ("out_of_fold", "test")
        if name in found
    )
    run.log.say(f"trained features, linear ({found['network']}): {said}")
    return found


def _look_at_knowledge(run: Run) -> dict[str, Any]:
    """What a store's answers are worth on the images that are learned from.

    Raises:
        ValueError: no better than one answer for all, without ``--allow-untrained-teacher``.
    """
    teacher, options = stored_teacher(run), run.settings.teacher
    learned = [run.data.train_rows(fold) for fold in run.settings.run.folds]
    images = run.data.images.subset(np.unique(np.concatenate(learned)))
    answers = teacher.logits(images.keys, 0).argmax(axis=1)
    found = float((answers == images.labels).mean())
    share = float(np.bincount(images.labels).max() / len(images))
    run.log.say(
        f"stored teacher: accuracy {found:.4f} on the images to learn from, always the commonest "
        f"class {share:.4f}; which images it was trained on is not known here"
    )
    if found <= share and not options.allow_untrained_teacher:
        raise ValueError(
            f"--teacher-knowledge {options.teacher_knowledge}: its accuracy {found:.4f} is no "
            "better than one answer for all; add --allow-untrained-teacher to use it"
        )
    return {
        "accuracy_on_fold_images": found,
        "teacher_hash": teacher.store.about["teacher_hash"],
        "saw": teacher.store.about["view"],
        "views": teacher.views or "one answer an image",
        "mixup": "answers of the two images mixed; the teacher did not see the mixture",
    }


def _evaluate(run: Run) -> dict[str, Any]:
    """Every fold's model on its validation part, and all together on the held-out part."""
    found = main_writes(lambda: {"out_of_fold": out_of_fold(run), "test": held_out(run)}, run.world)
    return {name: part for name, part in found.items() if part is not None}


def _report(run: Run, command: str) -> dict[str, Any]:
    """The record and the report, from what the stages left."""
    stages, fold = run.log.stages, run.settings.run.folds[0]
    prepared = stages["prepare"]
    measured: dict[str, Any] = {"teacher": teacher_facts(run), "validated": run.validated}
    measured["start"] = prepared["start"]
    for name in ("floor", "trained_floor"):
        if prepared.get(name):
            measured[name] = prepared[name]
    measured |= {k: v for k, v in stages[f"evaluate{run.evaluated}"].items() if k in JUDGED}
    measured["parameters"] = stages[f"fold{fold}"]["parameters"]
    if run.settings.records.compare_seeds:
        measured["comparison"] = main_writes(lambda: summary(run), run.world)

    def write() -> None:
        record = write_record(run, measured, command=prepared.get("command", command))
        write_report(run, record)

    main_writes(write, run.world)
    folds = measured["out_of_fold"]["accuracy"]
    deviation = "" if folds["std"] is None else f" +- {folds['std']:.4f}"
    run.log.say(f"{run.validated}: accuracy {folds['mean']:.4f}{deviation} over {folds['runs']}")
    if "test" in measured:
        run.log.say(
            f"{judged_model(run)}, held out: {measured['test']['ensemble']['accuracy']:.4f}"
        )
    if run.student_file(None).exists():
        run.log.say(f"the model to export: {run.student_file(None)}")
    run.log.say(f"report: {run.folder / 'report.html'}")
    return {"verdicts": verdicts(measured)}
