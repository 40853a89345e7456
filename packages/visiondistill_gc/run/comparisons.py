"""What distillation, Mixup and a teacher that knows something are worth: arms and seeds, paired.

All arms of a seed start from the same weights and see the same views in the same order. They
train on one fold's training part, keep the last epoch, and are judged on images that nobody saw.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from shared_core.datasets import ImageSet
from shared_core.for_paddle.distributed import main_writes
from shared_core.for_paddle.seeds import seed_all
from shared_core.metrics import paired_difference, summarize
from shared_core.runs import derive_seed
from visiondistill_gc.run.context import Run, predict
from visiondistill_gc.run.stages import load_teacher, make_teacher, new_student, train
from visiondistill_gc.utils.teaching import Teacher, with_random_head
from visiondistill_gc.utils.train_utils import Plan
from visiondistill_gc.utils.visual_log import VisualLog

# name: (whether a teacher, whether it has a random head, whether batches are mixed)
ARMS = {
    "distilled": (True, False, True),
    "undistilled": (False, False, True),
    "without_mixup": (True, False, False),
    "random_head_teacher": (True, True, True),
}


def fold_of(run: Run) -> int:
    """The first of the folds that this run trains."""
    return run.settings.run.folds[0]


def judged_on(run: Run) -> tuple[str, ImageSet]:
    """Held-out images, or the fold's validation part when there are none."""
    if run.data.test is not None:
        return "test", run.data.test
    return "validation", run.data.images.subset(run.data.validation_rows(fold_of(run)))


def compare_one(run: Run, arm: str, number: int) -> dict[str, Any]:
    """Train one arm with one seed; its accuracy."""
    how, epochs = run.settings.training, run.settings.records.compare_epochs
    taught, random_head, mixed = ARMS[arm]
    seed = derive_seed(run.settings.run.seed, "compare", number)
    teacher: Teacher | None = None
    if taught:
        net = load_teacher(run, fold_of(run)).net
        if random_head:
            with_random_head(net, seed=seed % 2**32)
        teacher = make_teacher(run, fold_of(run), net=net)
    seed_all(seed % 2**32)
    student = new_student(run)
    own = replace(
        how,
        epochs=epochs,
        warmup_epochs=min(how.warmup_epochs, epochs - 1),
        mixup=(how.mixup or 0.2) if mixed else 0.0,
        mixup_start=min(how.mixup_start, epochs // 2),
        patience=0,
    )
    _, state = train(
        run,
        f"compare-{arm}-{number}",
        student,
        plan=Plan(own, seed=seed, keep="last"),
        fold=fold_of(run),
        teacher=teacher,
        visual=VisualLog(None),
        view_seed=derive_seed(seed, "views"),
    )
    _, images = judged_on(run)
    found = main_writes(lambda: predict(run, student, images).accuracy, run.world)
    return {"accuracy": found, "seconds": state.seconds}


def teacher_accuracies(run: Run) -> dict[str, float]:
    """What the right teacher and one with a random head know of the same images."""
    _, images = judged_on(run)
    net = load_teacher(run, fold_of(run)).net
    right = predict(run, net, images).accuracy
    with_random_head(net, seed=derive_seed(run.settings.run.seed, "compare", 0) % 2**32)
    return {"right": right, "random_head": predict(run, net, images).accuracy}


def summary(run: Run, results: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Mean and deviation of each arm, and its paired difference to ``distilled``.

    Args:
        results: accuracy by arm and seed.
    """
    seeds = list(run.settings.records.compare_seeds)
    arms, differences = {}, {}
    for arm, by_seed in results.items():
        values = [by_seed[seed] for seed in seeds]
        found = summarize(values)
        arms[arm] = {"mean": found.mean, "std": found.std, "values": values}
    base = np.array([results["distilled"][seed] for seed in seeds])
    for arm in results:
        if arm == "distilled" or len(seeds) < 2:
            continue
        gap = paired_difference(base, [results[arm][seed] for seed in seeds])
        differences[f"distilled - {arm}"] = {
            "mean": gap.mean,
            "low": gap.low,
            "high": gap.high,
            "wins": gap.wins,
            "seeds": gap.n,
        }
    where, images = judged_on(run)
    return {
        "epochs": run.settings.records.compare_epochs,
        "judged_on": where,
        "images": len(images),
        "seeds": seeds,
        "teachers": teacher_accuracies(run),
        "arms": arms,
        "differences": differences,
    }
