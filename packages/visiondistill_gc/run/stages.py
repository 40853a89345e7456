"""The training stages of a fold: its teacher, then its student; each ends with a model file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from shared_core.checkpoints import CheckpointError
from shared_core.for_paddle.checkpoints import unwrap
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.distributed import main_writes
from shared_core.for_paddle.seeds import seed_all
from shared_core.knowledge import KnowledgeStore
from shared_core.metrics import nll_from_logits, softmax
from shared_core.runs import derive_seed
from visiondistill_gc.models.lite_model import Lite
from visiondistill_gc.models.student_model import count_parameters
from visiondistill_gc.models.teacher_model import Renormalised, freeze
from visiondistill_gc.options import TrainingOptions
from visiondistill_gc.run.context import Run, predict
from visiondistill_gc.run.starting import (
    STUDENT,
    TEACHER,
    new_net,
    normal_of_student,
    probes,
)
from visiondistill_gc.utils.data_utils import train_loader, train_view
from visiondistill_gc.utils.loss import DistillationLoss, balanced_weights
from visiondistill_gc.utils.model_files import (
    LoadedModel,
    check_categories,
    is_of_head,
    load_model,
    save_model,
)
from visiondistill_gc.utils.prediction_files import load_predictions, save_predictions
from visiondistill_gc.utils.teaching import LiveTeacher, StoredTeacher, Teacher
from visiondistill_gc.utils.train_utils import Best, Plan, StageState, Training, fit
from visiondistill_gc.utils.transforms import eval_view
from visiondistill_gc.utils.visual_log import VisualLog


def make_optimizer(net: nn.Layer, how: TrainingOptions) -> Any:
    """Adam with L2 through the gradients, as the original; or AdamW, which decays the weights.

    The head's rate is ``head_rate`` times that of what is below it.
    """
    learned = []
    for name, parameter in net.named_parameters():
        if parameter.stop_gradient:
            continue
        learned.append(parameter)
        if is_of_head(name):
            parameter.optimize_attr["learning_rate"] = how.head_rate
    kind = {"adam": paddle.optimizer.Adam, "adamw": paddle.optimizer.AdamW}[how.optimizer]
    return kind(learning_rate=how.lr, parameters=learned, weight_decay=how.weight_decay)


def train(
    run: Run,
    stage: str,
    net: nn.Layer,
    *,
    plan: Plan,
    fold: int | None,
    teacher: Teacher | None,
    visual: VisualLog,
) -> tuple[Best, StageState]:
    """Train ``net`` on a fold's training part; its validation part is looked at every epoch.

    Without a fold all images are learned from, and none is looked at.
    """
    data, how = run.data, plan.how
    images = data.images.subset(data.train_rows(fold))
    views = teacher.views if isinstance(teacher, StoredTeacher) else None
    seed = run.settings.teacher.knowledge_seed if views else derive_seed(plan.seed, "views")
    loader = train_loader(
        images,
        view=train_view(run.settings, seed=seed),
        batch_size=how.batch_size // run.world.world_size,
        order_seed=derive_seed(plan.seed, "order"),
        workers=run.settings.data.workers,
        rank=run.world.rank,
        world_size=run.world.world_size,
        views=views,
    )
    precision = run.precision()
    if isinstance(net, Lite) and run.world.device.startswith("cpu"):
        net.hasten(
            run.folder / "state" / f"front_{run.world.rank}",
            input_size=run.settings.data.input_size,
            threads=run.threads,
        )
    normal = net.normal
    net, optimizer = precision.decorate(net, make_optimizer(net, how))

    def validate(trained: nn.Layer) -> dict[str, float]:
        if fold is None:
            return {}
        held = data.images.subset(data.validation_rows(fold))
        answers = predict(run, trained, held, precision=precision)
        loss = nll_from_logits(answers.logits, answers.labels)
        return {"loss": loss, "acc": answers.accuracy}

    training = Training(
        stage=stage,
        net=net,
        optimizer=optimizer,
        loss=_loss(run, fold, how, taught=teacher is not None),
        teacher=teacher,
        images=images,
        loader=loader,
        validate=validate,
        num_classes=len(data.classes),
        normalizer=Normalizer(*normal),
        precision=precision,
        plan=plan,
        log=run.log,
        world=run.world,
        visual=visual,
    )
    return fit(training)


def _loss(run: Run, fold: int | None, how: TrainingOptions, *, taught: bool) -> DistillationLoss:
    return DistillationLoss(
        temperature=how.temperature,
        alpha=how.alpha if taught else 1.0,
        class_weights=class_weights(run, fold),
    )


def class_weights(run: Run, fold: int | None) -> np.ndarray | None:
    """Balanced weights of a fold's training part, unless ``--class-weights none``."""
    if run.settings.training.class_weights == "none":
        return None
    labels = run.data.images.labels[run.data.train_rows(fold)]
    return balanced_weights(labels, num_classes=len(run.data.classes))


def _save(run: Run, path: Path, net: nn.Layer, fold: int | None, **facts: Any) -> None:
    """A model file of this run; ``facts``: architecture, epoch, metrics and more."""
    save_model(
        path,
        net,
        class_names=run.data.classes,
        input_size=run.settings.data.input_size,
        mean=net.normal[0],
        std=net.normal[1],
        start=run.log.stages["prepare"]["start"],
        weights={k: v.astype("float32") for k, v in net.state_dict().items()},
        split_hash=run.data.prepared.manifest.hash,
        config=run.opened.config,
        data=run.data.prepared.name,
        fold=fold,
        **facts,
    )


# -- the teacher ----------------------------------------------------------------------------------


def teacher_plan(run: Run, seed: int) -> Plan:
    """The training options with the teacher's epochs, rate and batch; its last epoch is kept."""
    how, teacher = run.settings.training, run.settings.teacher
    own = replace(
        how,
        epochs=teacher.teacher_epochs,
        lr=teacher.teacher_lr,
        batch_size=teacher.teacher_batch_size,
        warmup_epochs=min(how.warmup_epochs, teacher.teacher_epochs - 1),
        mixup_start=min(how.mixup_start, teacher.teacher_epochs // 2),
        patience=0,
    )
    return Plan(own, seed=seed, keep="last")


def train_teacher(run: Run, fold: int) -> dict[str, Any]:
    """A teacher of its own for a fold, from the fold's training part alone.

    Nothing is chosen on the validation part: the last epoch (its average, with ``--ema``) is kept.
    Its accuracy there is what is printed before it teaches.

    Raises:
        ValueError: an untrained head, or one that knows nothing, without
            ``--allow-untrained-teacher``.
    """
    options, stage = run.settings.teacher, f"teacher{fold}"
    seed = derive_seed(run.settings.run.seed, stage)
    seed_all(seed % 2**32)
    net = new_net(run, TEACHER, fold)
    epoch, seconds = 0, 0.0
    if options.teacher_epochs:
        visual = run.visual(f"teacher_fold_{fold}")
        plan = teacher_plan(run, seed)
        best, state = train(run, stage, net, plan=plan, fold=fold, teacher=None, visual=visual)
        visual.close()
        epoch, seconds = best.epoch + 1, state.seconds
    trained = bool(options.teacher_epochs) or probes(run, TEACHER)
    result = _judge_teacher(run, net, fold, trained=trained)
    facts: dict[str, Any] = {
        "architecture": options.teacher,
        "epoch": epoch,
        "metrics": {"validation_accuracy": result["accuracy"]},
        "head_trained": result["trained"],
    }
    main_writes(lambda: _save(run, run.teacher_file(fold), net, fold, **facts), run.world)
    return {**result, "file": run.teacher_file(fold).name, "seconds": seconds}


def _judge_teacher(run: Run, net: nn.Layer, fold: int, *, trained: bool) -> dict[str, Any]:
    """Say what a teacher knows; refuse one that knows nothing."""
    held = run.data.images.subset(run.data.validation_rows(fold))
    found = main_writes(lambda: predict(run, freeze(net), held).accuracy, run.world)
    share = float(np.bincount(held.labels).max() / len(held))
    run.log.say(
        f"teacher of fold {fold}: validation accuracy {found:.4f}, "
        f"always the commonest class {share:.4f}" + ("" if trained else "; its head is UNTRAINED")
    )
    allowed = run.settings.teacher.allow_untrained_teacher
    if not allowed and (not trained or found <= share):
        what = "has an untrained head" if not trained else "is no better than one answer for all"
        raise ValueError(
            f"the teacher of fold {fold} {what} (validation accuracy {found:.4f}): train it "
            "(--teacher-epochs), name a trained one (--teacher-weights), or add "
            "--allow-untrained-teacher"
        )
    return {"accuracy": found, "commonest": share, "trained": trained}


def given_teacher(run: Run, fold: int) -> dict[str, Any]:
    """The teacher that ``--teacher-weights`` names, looked at before it teaches.

    Raises:
        CheckpointError, ValueError: no model of this project, or one of other classes.
    """
    loaded = load_teacher(run, fold)
    trained = bool(loaded.facts.get("head_trained", loaded.facts["epoch"]))
    return _judge_teacher(run, loaded.net, fold, trained=trained)


def load_teacher(run: Run, fold: int) -> LoadedModel:
    """A finished teacher; it must know the run's classes and take its pixels."""
    path, pixels = run.teacher_file(fold), run.settings.data.input_size
    loaded = load_model(path)
    check_categories(path, loaded.class_names, run.data.classes)
    if loaded.input_size != pixels:
        raise CheckpointError(
            f"{path} takes images of {loaded.input_size} pixels, expected --input-size {pixels}"
        )
    return loaded


def make_teacher(run: Run, fold: int, *, net: nn.Layer | None = None) -> Teacher | None:
    """Whatever answers for a fold: a store, the fold's teacher (or ``net``), or nobody."""
    if run.settings.training.alpha == 1:
        return None
    if not run.teacher_runs:
        return stored_teacher(run)
    net, normal = net or load_teacher(run, fold).net, normal_of_student(run)
    return LiveTeacher(
        net if net.normal == normal else Renormalised(net, normal),
        engine=run.settings.teacher.teacher_engine,
        folder=run.folder / "state" / f"teacher_engine_{run.world.rank}",
        input_size=run.settings.data.input_size,
        threads=run.threads,
    )


def stored_teacher(run: Run) -> StoredTeacher:
    """The answers that ``--teacher-knowledge`` names."""
    options = run.settings.teacher
    return StoredTeacher(
        options.teacher_knowledge,
        classes=run.data.classes,
        train_view=train_view(run.settings, seed=options.knowledge_seed).settings(),
        temperature=run.settings.training.temperature,
    )


# -- the student ----------------------------------------------------------------------------------


def train_student(run: Run, fold: int | None) -> dict[str, Any]:
    """The student of a fold, its best epoch by validation accuracy; or of all folds, the last."""
    stage = "one" if fold is None else f"fold{fold}"
    seed = derive_seed(run.settings.run.seed, stage)
    teacher = folds_teacher(run) if fold is None else make_teacher(run, fold)
    seed_all(seed % 2**32)
    net = new_net(run, STUDENT, fold)
    visual = run.visual(stage if fold is None else f"fold_{fold}")
    plan = Plan(run.settings.training, seed=seed, keep="last" if fold is None else "best")
    best, state = train(run, stage, net, plan=plan, fold=fold, teacher=teacher, visual=visual)
    main_writes(lambda: _keep_student(run, unwrap(net), fold, best, visual), run.world)
    visual.close()
    return {
        **({} if fold is None else {"accuracy": best.accuracy}),
        "epoch": best.epoch,
        "file": run.student_file(fold).name,
        "parameters": count_parameters(net),
        "seconds": state.seconds,
    }


def folds_teacher(run: Run) -> StoredTeacher:
    """What each fold's student said of its validation part, as a store that any project reads.

    So every image is answered by a model that did not learn it.
    """
    folder, data = run.folder / "knowledge", run.data
    main_writes(lambda: _store_out_of_fold(run, folder), run.world)
    return StoredTeacher(
        folder,
        classes=data.classes,
        train_view=train_view(run.settings, seed=0).settings(),
        temperature=run.settings.training.temperature,
    )


def _store_out_of_fold(run: Run, folder: Path) -> None:
    """Write the folds' answers; a store that is there already is completed."""
    data, folds = run.data, run.settings.run.folds
    key = {entry.path: entry.key for entry in data.entries}
    students = [load_model(run.student_file(fold)).facts["sha256"] for fold in folds]
    with KnowledgeStore.create(
        folder,
        teacher_hash=hashlib.sha256(" ".join(students).encode()).hexdigest(),
        classes=list(data.classes),
        view=eval_view(run.settings.data.input_size).settings(),
        kind="probs",
        dtype="float32",
    ) as store:
        for fold in folds:
            part = load_predictions(run.folder / "predictions" / f"fold{fold}.npz")
            store.put([key[path] for path in part.keys], 0, part.probs)


def _keep_student(run: Run, net: nn.Layer, fold: int | None, best: Best, visual: VisualLog) -> None:
    """Model file, predictions of the validation part, and what VisualDL shows at the end."""
    data, path = run.data, run.student_file(fold)
    _save(
        run,
        path,
        net,
        fold,
        architecture=run.settings.student.student,
        epoch=best.epoch,
        metrics={} if fold is None else {"validation_accuracy": best.accuracy},
    )
    if fold is None:
        return
    rows = data.validation_rows(fold)
    answers = predict(run, load_model(path).net, data.images.subset(rows))
    probs = softmax(answers.logits)
    save_predictions(
        run.folder / "predictions" / f"fold{fold}.npz",
        probs,
        answers.labels,
        [data.entries[row].path for row in rows],
        class_names=data.classes,
    )
    visual.pr_curves(probs, answers.labels, data.classes, step=best.epoch)
    visual.histograms(net, step=best.epoch)
