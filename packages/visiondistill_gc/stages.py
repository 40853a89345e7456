"""The training stages of a fold: its teacher, then its student; each ends with a model file."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import paddle
from paddle import nn

from shared_core.checkpoints import CheckpointError
from shared_core.for_paddle.checkpoints import unwrap
from shared_core.for_paddle.distributed import barrier, main_writes
from shared_core.for_paddle.seeds import seed_all
from shared_core.metrics.predictions import save_predictions
from shared_core.runs import derive_seed
from visiondistill_gc.models.student_model import build_student, count_parameters
from visiondistill_gc.models.teacher_model import build_teacher, freeze
from visiondistill_gc.run_context import Run, accuracy, cross_entropy, normalizer, predict
from visiondistill_gc.utils.data_utils import train_loader, train_view
from visiondistill_gc.utils.loss import DistillationLoss, balanced_weights
from visiondistill_gc.utils.model_files import LoadedModel, check_categories, load_model, save_model
from visiondistill_gc.utils.prediction import softmax
from visiondistill_gc.utils.pretrained import load_pretrained
from visiondistill_gc.utils.teaching import LiveTeacher, StoredTeacher, Teacher
from visiondistill_gc.utils.train_utils import Plan, Training, fit
from visiondistill_gc.utils.transforms import eval_view
from visiondistill_gc.utils.visual_log import VisualLog


def make_optimizer(net: nn.Layer, args: argparse.Namespace, *, lr: float) -> Any:
    """Adam with L2 through the gradients, as the original; or AdamW, which decays the weights."""
    learned = [p for p in net.parameters() if not p.stop_gradient]
    kind = {"adam": paddle.optimizer.Adam, "adamw": paddle.optimizer.AdamW}[args.optimizer]
    return kind(learning_rate=lr, parameters=learned, weight_decay=args.weight_decay)


def train(
    run: Run,
    stage: str,
    net: nn.Layer,
    *,
    plan: Plan,
    fold: int,
    loss: DistillationLoss,
    teacher: Teacher | None,
    batch_size: int,
    visual: VisualLog,
    view_seed: int,
    views: int | None = None,
) -> tuple[Any, Any]:
    """Train ``net`` on a fold's training part; its validation part is looked at every epoch."""
    args, data = run.args, run.data
    images = data.images.subset(data.train_rows(fold))
    held = data.images.subset(data.validation_rows(fold))
    loader = train_loader(
        images,
        view=train_view(args, seed=view_seed),
        batch_size=batch_size,
        order_seed=derive_seed(plan.seed, "order"),
        workers=args.num_workers,
        rank=run.world.rank,
        world_size=run.world.world_size,
        views=views,
    )
    precision = run.precision()
    optimizer = make_optimizer(net, args, lr=plan.base_lr)
    net, optimizer = precision.decorate(net, optimizer)

    def validate(trained: nn.Layer) -> dict[str, float]:
        with precision.autocast():
            outputs = predict(run, trained, held)
        return {"loss": cross_entropy(outputs), "acc": accuracy(outputs)}

    return fit(
        Training(
            stage=stage,
            net=net,
            optimizer=optimizer,
            loss=loss,
            teacher=teacher,
            images=images,
            loader=loader,
            validate=validate,
            num_classes=len(data.classes),
            normalizer=normalizer(),
            precision=precision,
            plan=plan,
            log=run.log,
            world=run.world,
            visual=visual,
        )
    )


def class_weights(run: Run, fold: int) -> np.ndarray | None:
    """Balanced weights of a fold's training part, unless ``--class-weights none``."""
    if run.args.class_weights == "none":
        return None
    labels = run.data.images.labels[run.data.train_rows(fold)]
    return balanced_weights(labels, num_classes=len(run.data.classes))


def train_teacher(run: Run, fold: int) -> dict[str, Any]:
    """A teacher of its own for a fold, from the fold's training part alone.

    Nothing is chosen on the validation part: the last epoch (its average, with ``--ema``) is kept.
    Its accuracy there is what is printed before it teaches.

    Raises:
        ValueError: an untrained head, or one that knows nothing, without
            ``--allow-untrained-teacher``.
    """
    args, data, stage = run.args, run.data, f"teacher{fold}"
    seed = derive_seed(args.seed, stage)
    seed_all(seed % 2**32)
    net = build_teacher(args.teacher, num_classes=len(data.classes), source=args.teacher_source)
    if args.teacher_pretrained is not None:
        new = load_pretrained(args.teacher_pretrained, net)
        run.log.say(
            f"{stage}: starts from {args.teacher_pretrained}, "
            + (f"new: {', '.join(new)}" if new else "with its head")
        )
    epoch, seconds = 0, 0.0
    if args.teacher_epochs:
        plan = Plan(
            epochs=args.teacher_epochs,
            base_lr=args.teacher_lr,
            warmup=min(args.warmup_epochs, args.teacher_epochs - 1),
            schedule=args.schedule,
            mixup=args.mixup,
            mixup_start=min(args.mixup_start, args.teacher_epochs // 2),
            smoothing=args.label_smoothing,
            patience=0,
            keep="last",
            clip=args.clip_grad,
            ema=args.ema,
            save_every=args.save_every,
            seed=seed,
        )
        best, state = train(
            run,
            stage,
            net,
            plan=plan,
            fold=fold,
            loss=DistillationLoss(alpha=1.0, class_weights=class_weights(run, fold)),
            teacher=None,
            batch_size=args.teacher_batch_size,
            visual=(visual := run.visual(f"teacher_fold_{fold}")),
            view_seed=derive_seed(seed, "views"),
        )
        visual.close()
        epoch, seconds = best.epoch + 1, state.seconds
    result = _judge_teacher(run, net, fold, trained=bool(args.teacher_epochs))
    main_writes(
        lambda: save_model(
            run.teacher_file(fold),
            net,
            class_names=data.classes,
            architecture=args.teacher,
            input_size=args.input_size,
            weights={k: v.astype("float32") for k, v in net.state_dict().items()},
            epoch=epoch,
            metrics={"validation_accuracy": result["accuracy"]},
            split_hash=data.prepared.manifest.hash,
            config=run.config,
            head_trained=result["trained"],
            fold=fold,
        ),
        run.world,
    )
    return {**result, "file": run.teacher_file(fold).name, "seconds": seconds}


def _judge_teacher(run: Run, net: nn.Layer, fold: int, *, trained: bool) -> dict[str, Any]:
    """Say what a teacher knows; refuse one that knows nothing."""
    held = run.data.images.subset(run.data.validation_rows(fold))
    found = main_writes(lambda: accuracy(predict(run, freeze(net), held)), run.world)
    share = float(np.bincount(held.labels).max() / len(held))
    run.log.say(
        f"teacher of fold {fold}: validation accuracy {found:.4f}, "
        f"always the commonest class {share:.4f}" + ("" if trained else "; its head is UNTRAINED")
    )
    if not run.args.allow_untrained_teacher and (not trained or found <= share):
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
    path = run.teacher_file(fold)
    loaded = load_model(path)
    check_categories(path, loaded.class_names, run.data.classes)
    if loaded.input_size != run.args.input_size:
        raise CheckpointError(
            f"{path} takes images of {loaded.input_size} pixels, expected --input-size "
            f"{run.args.input_size}"
        )
    return loaded


def make_teacher(run: Run, fold: int, *, net: nn.Layer | None = None) -> Teacher | None:
    """Whatever answers for a fold: a store, the fold's teacher (or ``net``), or nobody."""
    args = run.args
    if args.alpha == 1:
        return None
    if args.teacher_knowledge is not None:
        return stored_teacher(run)
    return LiveTeacher(
        load_teacher(run, fold).net if net is None else net,
        engine=args.teacher_engine,
        folder=run.folder / "state" / f"teacher_engine_{run.world.rank}",
        input_size=args.input_size,
        threads=args.threads,
    )


def stored_teacher(run: Run) -> StoredTeacher:
    """The answers that ``--teacher-knowledge`` names."""
    args = run.args
    return StoredTeacher(
        args.teacher_knowledge,
        classes=run.data.classes,
        train_view=train_view(args, seed=args.knowledge_seed).settings(),
        eval_view=eval_view(args.input_size).settings(),
        temperature=args.temperature,
    )


def student_plan(args: argparse.Namespace, *, seed: int, **changed: Any) -> Plan:
    """The options' plan of a student."""
    settings: dict[str, Any] = {
        "epochs": args.epochs,
        "base_lr": args.base_lr,
        "warmup": args.warmup_epochs,
        "schedule": args.schedule,
        "mixup": args.mixup,
        "mixup_start": args.mixup_start,
        "smoothing": args.label_smoothing,
        "patience": args.patience,
        "clip": args.clip_grad,
        "ema": args.ema,
        "save_every": args.save_every,
        "seed": seed,
    }
    return Plan(**{**settings, **changed})


def new_student(run: Run) -> nn.Layer:
    """A student of the options, from ``--pretrained`` weights if there are any."""
    args = run.args
    net = build_student(
        num_classes=len(run.data.classes),
        scale=args.student_scale,
        head=args.head,
        frozen=args.frozen,
        freeze_bn=args.freeze_bn,
        dropout=args.dropout,
        hidden=args.hidden,
        source=args.student_source,
    )
    if args.pretrained is not None:
        load_pretrained(args.pretrained, net)
    return net


def train_student(run: Run, fold: int) -> dict[str, Any]:
    """The student of a fold; its best epoch by validation accuracy is kept."""
    args, stage = run.args, f"fold{fold}"
    seed = derive_seed(args.seed, stage)
    teacher = make_teacher(run, fold)
    seed_all(seed % 2**32)
    net = new_student(run)
    views = teacher.views if isinstance(teacher, StoredTeacher) else None
    visual = run.visual(f"fold_{fold}")
    best, state = train(
        run,
        stage,
        net,
        plan=student_plan(args, seed=seed),
        fold=fold,
        loss=DistillationLoss(
            temperature=args.temperature,
            alpha=args.alpha,
            class_weights=class_weights(run, fold),
        ),
        teacher=teacher,
        batch_size=args.batch_size,
        visual=visual,
        view_seed=args.knowledge_seed if views else derive_seed(seed, "views"),
        views=views,
    )
    metrics = {"validation_accuracy": best.accuracy}
    main_writes(
        lambda: _keep_student(run, unwrap(net), fold, best.epoch, metrics, visual), run.world
    )
    visual.close()
    barrier(run.world)
    return {
        "accuracy": best.accuracy,
        "epoch": best.epoch,
        "file": run.student_file(fold).name,
        "parameters": count_parameters(net),
        "seconds": state.seconds,
        "state": str(state.path),
    }


def _keep_student(
    run: Run, net: nn.Layer, fold: int, epoch: int, metrics: dict[str, float], visual: VisualLog
) -> None:
    """Model file, predictions of the validation part, and what VisualDL shows at the end."""
    data, args = run.data, run.args
    rows = data.validation_rows(fold)
    save_model(
        run.student_file(fold),
        net,
        class_names=data.classes,
        architecture="mobilenet_v2",
        input_size=args.input_size,
        weights={k: v.astype("float32") for k, v in net.state_dict().items()},
        epoch=epoch,
        metrics=metrics,
        split_hash=data.prepared.manifest.hash,
        config=run.config,
        fold=fold,
    )
    loaded = load_model(run.student_file(fold))
    outputs = predict(run, loaded.net, data.images.subset(rows))
    probs = softmax(outputs.logits)
    save_predictions(
        run.folder / "predictions" / f"fold{fold}.npz",
        probs,
        outputs.labels,
        [data.entries[row].path for row in rows],
        class_names=data.classes,
    )
    visual.pr_curves(probs, outputs.labels, data.classes, step=epoch)
    visual.histograms(net, step=epoch)
