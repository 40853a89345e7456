"""Training: epochs, validation, best and last weights, and a state to go on from exactly."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_core.checkpoints import make_facts
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.distributed import all_mean, gather_objects, unwrap, wrap
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best
from shared_core.runs import MetricLog, derive_seed
from shared_core.runs.progress import format_seconds
from torch_cls_zoo.applications.learn import Learner, Sums, Targets, run_epoch
from torch_cls_zoo.applications.run_state import RunState
from torch_cls_zoo.applications.session import PROJECT, Session, criterion_of, only_main
from torch_cls_zoo.applications.test import Outputs, measure, plain_criterion, run_network
from torch_cls_zoo.dataloader.batch_ops import SCALE_SPREAD, BatchOps
from torch_cls_zoo.dataloader.curriculum_files import read_curriculum
from torch_cls_zoo.dataloader.folders import Part, part
from torch_cls_zoo.dataloader.knowledge_files import read_knowledge
from torch_cls_zoo.dataloader.loaders import eval_loader, train_loader
from torch_cls_zoo.optim import build_optimizer, build_schedule
from torch_cls_zoo.utils.bias_prior import set_bias_prior, share_of_classes
from torch_cls_zoo.utils.sparsity import add_slimming
from torch_cls_zoo.utils.tensorboard_log import TensorBoardLog

STATE_FILE = Path("state") / "train.pth"
# What says where or how a run was started, not what it is: a checkpoint does not depend on it.
NOT_IN_FACTS = (
    "given", "modes", "command", "output", "logdir", "exact", "fresh", "arch_given", "workers",
    "print_freq", "save_every", "init_method", "rank", "nodes", "gpus",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    best: Path  # weights with the best validation accuracy
    last: Path
    best_epoch: int  # from 0
    best_accuracy: float  # validation, fraction in [0, 1]
    epochs: int
    seconds: float
    unreadable: int  # training images that could not be read in the last epoch


def learning_targets(session: Session, train: Part) -> tuple[Targets, list[str]]:
    """Teachers' probabilities and curriculum weights, and what to say of them."""
    args, notes, targets = session.args, [], Targets()
    if args.distill:
        soft = read_knowledge(
            args.knowledge_dir,
            train.paths,
            train.images.labels,
            classes=session.classes,
            sums_to_one=session.family == "softmax",
            allow_missing=args.distill_allow_missing,
        )
        targets.soft = torch.from_numpy(soft.values)
        notes.append(
            f"distilling from {', '.join(soft.files)}; {soft.missing} images without a teacher"
        )
    if args.curriculum_learning:
        weights = read_curriculum(args.knowledge_dir, train.paths)
        targets.weights = torch.from_numpy(weights)
        notes.append(
            f"curriculum: {int((weights > 0).sum())} of {len(weights)} images, "
            f"mean weight {weights.mean():.3f}"
        )
    return targets, notes


def make_learner(session: Session) -> tuple[Learner, TorchLoader]:
    """The training step and its batches, as the options say; the model is not wrapped yet.

    Raises:
        ValueError: options that do not fit the network or the data, files that are missing.
    """
    args, world = session.args, session.world
    train_part = part(session.data, "train")
    targets, notes = learning_targets(session, train_part)
    for note in notes:
        session.say(note)
    if args.multi_scale:
        check_sizes(session)
    if args.bias_prior is not None:
        _set_priors(session, train_part)
    if args.sync_bn:
        session.model = nn.SyncBatchNorm.convert_sync_batchnorm(session.model)
    optimizer = build_optimizer(
        args.opt, session.model, args.lr, weight_decay=args.wd, momentum=args.momentum
    )
    if args.sparsity:
        add_slimming(optimizer, session.model, args.slim)
    learner = Learner(
        session.model,
        criterion_of(session),
        optimizer,
        Precision(world.device, args.amp),
        _batch_ops(session),
        targets,
        world,
        len(session.classes),
        mix_targets=args.mix_targets,
    )
    loader = train_loader(
        train_part.images,
        session.settings,
        batch_size=session.batch_size,
        policy=args.aug_policy,
        seed=args.seed,
        world=world,
        threads=session.threads,
    )
    return learner, loader


def train(session: Session) -> Trained:
    """Train the session's network; afterwards it holds the best weights.

    Raises:
        ValueError: options that do not fit together, a loss that is not finite.
    """
    args, world = session.args, session.world
    val_part = part(session.data, "val")
    learner, loader = make_learner(session)
    model, optimizer = session.model, learner.optimizer
    schedule = build_schedule(
        optimizer,
        epochs=args.epochs,
        warmup=args.warmup,
        lr_ratios=args.lr_ratios,
        lr_steps=args.lr_steps,
    )
    validation = eval_loader(
        val_part.images,
        session.settings,
        batch_size=session.batch_size,
        world=world,
        threads=session.threads,
    )
    best = Best()
    parts = {
        "model": model,
        "criterion": learner.criterion,
        "optimizer": optimizer,
        "schedule": schedule,
        "precision": learner.precision,
        "loader": loader,
        "best": best,
    }
    log = MetricLog(args.output / "metrics.jsonl")
    state = RunState(args.output / STATE_FILE, parts, log, session)
    epoch, sums = state.restore()
    # After the state is back: wrapping copies the weights to the other processes.
    learner.model = wrap(model, world)
    board = TensorBoardLog(args.logdir, enabled=world.is_main, first_step=epoch)
    plain = plain_criterion(session)
    started, begun = time.monotonic(), epoch
    try:
        while epoch < args.epochs:
            rate = schedule.set_epoch(epoch)
            first_number = epoch * len(loader)
            for _ in run_epoch(learner, loader, sums, first_number=first_number):  # fills sums
                _say_batch(session, epoch, sums, len(loader))
                if args.save_every and sums.batches % args.save_every == 0:
                    state.save(epoch, sums)
            trained = _sums_of_all(sums, session)
            outputs = run_network(model, validation, val_part, world)
            values = measure(outputs, plain, num_classes=len(session.classes))
            improved = best.offer(model, values["accuracy"], epoch)
            _log_epoch(session, log, board, epoch, rate, trained, values, model)
            if improved:
                _log_pictures(board, session, outputs, values, epoch)
            last_unreadable = len(sums.unreadable)
            epoch, sums = epoch + 1, Sums()
            _write_weights(session, best, values, epoch, improved)
            state.save(epoch, sums, unreadable=last_unreadable)
            left = (time.monotonic() - started) / (epoch - begun) * (args.epochs - epoch)
            session.say(
                f"epoch {epoch}/{args.epochs}: lr {rate:.3g}, loss {trained['loss']:.4f}, train "
                f"accuracy {trained['accuracy']:.4f}, val {values['accuracy']:.4f} "
                f"(best {best.accuracy:.4f} of epoch {best.epoch + 1}), "
                f"{format_seconds(left)} left"
            )
    finally:
        board.close()
    unwrap(model).load_state_dict(best.weights)
    files = weight_files(session)
    return Trained(
        best=files["best"],
        last=files["last"],
        best_epoch=best.epoch,
        best_accuracy=best.accuracy,
        epochs=args.epochs,
        seconds=state.seconds,
        unreadable=state.unreadable,
    )


def check_sizes(session: Session) -> None:
    """Refuse ``--multi_scale`` for a network that takes one size only.

    Raises:
        ValueError: it does.
    """
    height, width = session.settings.size
    smaller = (round(height * (1 - SCALE_SPREAD)), round(width * (1 - SCALE_SPREAD)))
    was_training = session.model.training
    session.model.eval()
    try:
        with torch.inference_mode():
            session.model(torch.zeros(1, 3, *smaller, device=session.world.device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"--multi_scale: {session.arch} takes one size only ({reason})") from error
    finally:
        session.model.train(was_training)


def _set_priors(session: Session, train_part: Part) -> None:
    """Start the head's biases from probabilities: given ones, or the classes' shares."""
    given, number = session.args.bias_prior, len(session.classes)
    priors: float | list[float]
    if given == ["data"]:
        priors = share_of_classes(train_part.images.labels.tolist(), number)
    else:
        priors = given[0] if len(given) == 1 else list(given)
    set_bias_prior(session.model, priors, num_classes=number, family=session.family)


def _batch_ops(session: Session) -> BatchOps:
    args = session.args
    return BatchOps(
        session.settings.size,
        mixup=args.mixup,
        cutmix=args.cutmix,
        ratio=args.mixup_ratio,
        mixup_alpha=args.mixup_alpha,
        cutmix_alpha=args.cutmix_alpha,
        multi_scale=args.multi_scale,
        seed=derive_seed(args.seed, "batches"),
    )


def _sums_of_all(sums: Sums, session: Session) -> dict[str, Any]:
    """The epoch's loss and accuracy over all processes."""
    world = session.world
    return {
        "loss": all_mean(sums.mean_loss(), world, weight=sums.images),
        "accuracy": all_mean(sums.accuracy(), world, weight=sums.images),
        "images": sum(gather_objects(sums.images, world)),
        "unreadable": len(sums.unreadable),
    }


def _say_batch(session: Session, epoch: int, sums: Sums, total: int) -> None:
    if sums.batches % session.args.print_freq == 0 and sums.batches < total:
        session.say(
            f"epoch {epoch + 1}, batch {sums.batches}/{total}: loss {sums.mean_loss():.4f}, "
            f"accuracy {sums.accuracy():.4f}"
        )


def _log_epoch(
    session: Session,
    log: MetricLog,
    board: TensorBoardLog,
    epoch: int,
    rate: float,
    trained: dict[str, Any],
    values: dict[str, Any],
    model: nn.Module,
) -> None:
    if not session.world.is_main:
        return
    numbers = {k: v for k, v in values.items() if k != "confusion"}
    log.write({"split": "train", "epoch": epoch, "lr": rate, **trained})
    log.write({"split": "val", "epoch": epoch, **numbers})
    board.scalars(
        {
            "Train/Loss": trained["loss"],
            "Train/Accuracy": trained["accuracy"],
            "Val/Loss": values["loss"],
            "Val/Accuracy": values["accuracy"],
            "learning rate": rate,
        },
        epoch,
    )
    if session.args.histograms:
        board.gammas(model, epoch)


def _log_pictures(
    board: TensorBoardLog, session: Session, outputs: Outputs, values: dict[str, Any], epoch: int
) -> None:
    if session.world.is_main:
        board.confusion(values["confusion"], session.classes, epoch)
        board.predictions(outputs, session.classes, session.settings.size, epoch)


def weight_files(session: Session) -> dict[str, Path]:
    """Where the best and the last weights lie."""
    folder, name = session.args.output / "checkpoints", session.arch.replace("/", "_")
    return {
        "best": folder / f"model_best_{name}.pth",
        "last": folder / f"checkpoint_{name}.pth",
    }


def _write_weights(
    session: Session, best: Best, values: dict[str, Any], epochs: int, improved: bool
) -> None:
    """The last weights each epoch, the best when they are new; by the main process."""
    files = weight_files(session)
    plain = unwrap(session.model)

    def write() -> None:
        facts = facts_of(session, epochs, values)
        save_checkpoint(files["last"], plain.state_dict(), facts)
        if improved or not files["best"].exists():
            save_checkpoint(files["best"], best.weights, {**facts, "epoch": best.epoch + 1})

    files["last"].parent.mkdir(parents=True, exist_ok=True)
    only_main(session.world, write)


def facts_of(session: Session, epochs: int, values: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the weights."""
    args = session.args
    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in NOT_IN_FACTS
    }
    return make_facts(
        project=PROJECT,
        architecture=session.arch,
        class_names=session.classes,
        framework="torch",
        input_size=(3, *session.settings.size),
        mean=session.settings.mean,
        std=session.settings.std,
        epoch=epochs,
        metrics={"val_accuracy": values["accuracy"], "val_loss": values["loss"]},
        split_hash=session.data.manifest.hash,
        config={**config, "criterion": session.family},
        **({"pruned": session.kept} if session.kept else {}),
    )
