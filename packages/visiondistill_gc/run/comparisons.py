"""What distillation, Mixup and a teacher that knows something are worth: arms and seeds, paired.

All arms of a seed start from the same weights and see the same views in the same order. They
train on one fold's training part, keep the last epoch, and are judged on images that nobody saw.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared_core.datasets import ImageSet
from shared_core.for_paddle.distributed import main_writes
from shared_core.for_paddle.seeds import seed_all
from shared_core.runs import derive_seed
from shared_core.trials import Cell, Difference, Trials, compare, spread
from visiondistill_gc.run.context import Run, predict
from visiondistill_gc.run.stages import load_teacher, make_teacher, train
from visiondistill_gc.run.starting import STUDENT, new_net
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


def arms_of(run: Run) -> list[str]:
    """Names of the arms; stored answers have no head to make random."""
    return [arm for arm, (_, random_head, _) in ARMS.items() if run.teacher_runs or not random_head]


def cells_of(run: Run) -> list[Cell]:
    """An arm with a seed each; what it was made with is the run's configuration."""
    seeds = run.settings.records.compare_seeds
    return [Cell(arm, {}, seed) for seed in seeds for arm in arms_of(run)]


def stage_of(cell: Cell) -> str:
    """The stage of the run that trains a cell."""
    return f"compare-{cell.name}-{cell.seed}"


def train_cell(run: Run, cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed; its accuracy."""
    how, epochs = run.settings.training, run.settings.records.compare_epochs
    taught, random_head, mixed = ARMS[cell.name]
    seed = derive_seed(run.settings.run.seed, "compare", cell.seed)
    teacher: Teacher | None = None
    if taught:
        net = load_teacher(run, fold_of(run)).net if random_head else None
        if net is not None:
            with_random_head(net, seed=seed % 2**32)
        teacher = make_teacher(run, fold_of(run), net=net)
    seed_all(seed % 2**32)
    student = new_net(run, STUDENT, fold_of(run))
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
        stage_of(cell),
        student,
        plan=Plan(own, seed=seed, keep="last"),
        fold=fold_of(run),
        teacher=teacher,
        visual=VisualLog(None),
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


def trials_of(run: Run) -> Trials:
    """What the cells gave, from the finished stages."""
    cells = cells_of(run)
    done = {(one.name, one.seed): run.log.stages[stage_of(one)] for one in cells}
    return Trials(tuple(cells), done, sum(one["seconds"] for one in done.values()))


def differences_of(trials: Trials) -> list[Difference]:
    """Of ``distilled`` to every other arm, paired by seed."""
    others = [arm for arm in trials.names if arm != "distilled"]
    return [compare(trials, "distilled", arm, "accuracy") for arm in others]


def summary(run: Run) -> dict[str, Any]:
    """For the record: mean and deviation of each arm, and the paired differences."""
    trials, (where, images) = trials_of(run), judged_on(run)
    return {
        "epochs": run.settings.records.compare_epochs,
        "judged_on": where,
        "images": len(images),
        "seeds": list(run.settings.records.compare_seeds),
        **({"teachers": teacher_accuracies(run)} if run.teacher_runs else {}),
        "arms": {arm: spread(trials.values(arm, "accuracy")) for arm in arms_of(run)},
        "differences": {one.name: one.plain() for one in differences_of(trials)},
    }
