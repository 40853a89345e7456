"""What a training needs before its first step, made from the settings: targets, loss, optimizer."""

from __future__ import annotations

import torch
from torch import nn

from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.precision import Precision, computes_bf16
from shared_core.for_torch.pretrained import parameter_groups
from shared_core.runs import derive_seed
from torch_cls_zoo.applications.learn import Learner, Targets
from torch_cls_zoo.applications.session import Session, criterion_of
from torch_cls_zoo.dataloader.batch_ops import SCALE_SPREAD, BatchOps
from torch_cls_zoo.dataloader.curriculum_files import read_curriculum
from torch_cls_zoo.dataloader.folders import Part, part
from torch_cls_zoo.dataloader.knowledge_files import read_knowledge
from torch_cls_zoo.dataloader.loaders import train_loader
from torch_cls_zoo.models.bias_prior import set_bias_prior, share_of_classes
from torch_cls_zoo.optim import Schedule, build_optimizer, build_schedule
from torch_cls_zoo.pruning.slimming import add_slimming

SMALLEST_BF16 = 64  # pixels


def make_learner(session: Session) -> tuple[Learner, TorchLoader, Schedule]:
    """The training step, its batches and its rates; the model is not wrapped yet.

    Raises:
        ValueError: options that do not fit the network or the data, files that are missing.
    """
    asked, augment, world = session.config.training, session.config.augment, session.world
    train_part = part(session.data, "train")
    targets = learning_targets(session, train_part)
    if augment.multi_scale:
        check_sizes(session)
    if asked.bias_prior is not None:
        _set_priors(session, train_part)
    if asked.sync_bn:
        session.model = nn.SyncBatchNorm.convert_sync_batchnorm(session.model)
    optimizer = _optimizer(session)
    learner = Learner(
        session.model,
        criterion_of(session),
        optimizer,
        Precision(world.device, _precision(asked.amp, session)),
        _batch_ops(session),
        targets,
        world,
        len(session.classes),
        mix_targets=augment.mix_targets,
        clip=asked.clip_grad or None,
        freeze_bn=asked.freeze_bn,
        accumulate=asked.accumulate,
        ema=Ema(session.model, decay=asked.ema) if asked.ema else None,
    )
    loader = train_loader(
        train_part.images,
        session.settings,
        batch_size=session.batch_size,
        policy=augment.aug_policy,
        crop=augment.crop,
        flip=augment.flip,
        quarter_turns=augment.quarter_turns,
        erasing=augment.erasing,
        balanced=augment.balanced,
        seed=session.config.data.seed,
        world=world,
        threads=session.config.data.workers,
    )
    schedule = build_schedule(
        optimizer,
        epochs=asked.epochs,
        warmup=asked.warmup,
        kind=asked.schedule,
        steps_per_epoch=len(loader),
        lr=asked.lr,
        lr_ratios=asked.lr_ratios,
        lr_steps=asked.lr_steps,
    )
    return learner, loader, schedule


def _optimizer(session: Session) -> torch.optim.Optimizer:
    """With rates by depth where they are asked for, and slimming."""
    asked = session.config.training
    groups = None
    if asked.head_lr is not None or asked.layer_decay < 1:
        groups = parameter_groups(
            session.model,
            num_classes=len(session.classes),
            body_lr=asked.lr,
            head_lr=asked.head_lr or asked.lr,
            weight_decay=asked.wd,
            layer_decay=asked.layer_decay,
        )
    optimizer = build_optimizer(
        asked.opt,
        session.model,
        asked.lr,
        weight_decay=asked.wd,
        momentum=asked.momentum,
        groups=groups,
    )
    if asked.sparsity:
        add_slimming(optimizer, session.model, asked.slim)
    return optimizer


def learning_targets(session: Session, train: Part) -> Targets:
    """Teachers' probabilities and curriculum weights; says what they are.

    Raises:
        ValueError, FileNotFoundError: files that are missing or of other images.
    """
    asked, targets = session.config.teaching, Targets()
    folder = asked.knowledge_dir or session.data.root
    if asked.distill:
        soft = read_knowledge(
            folder,
            train.paths,
            train.images.labels,
            classes=session.classes,
            sums_to_one=session.family == "softmax",
            allow_missing=asked.distill_allow_missing,
        )
        targets.soft = torch.from_numpy(soft.values)
        session.say(
            f"distilling from {', '.join(soft.files)}; {soft.missing} images without a teacher"
        )
    if asked.curriculum_learning:
        weights = read_curriculum(folder, train.paths)
        targets.weights = torch.from_numpy(weights)
        session.say(
            f"curriculum: {int((weights > 0).sum())} of {len(weights)} images, "
            f"mean weight {weights.mean():.3f}"
        )
    return targets


def _precision(asked: str, session: Session) -> str:
    """``auto`` made out; bf16 convolutions of maps of one pixel can give NaN on a processor."""
    if asked != "auto":
        return asked
    large = min(session.settings.size) >= SMALLEST_BF16
    return "bf16" if large and computes_bf16(session.world.device) else "fp32"


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
    given, number = session.config.training.bias_prior, len(session.classes)
    if given == ["data"]:
        given = share_of_classes(train_part.images.labels.tolist(), number)
    priors = given[0] if given is not None and len(given) == 1 else given
    set_bias_prior(session.model, priors, num_classes=number, family=session.family)


def _batch_ops(session: Session) -> BatchOps:
    asked = session.config.augment
    return BatchOps(
        session.settings.size,
        mixup=asked.mixup,
        cutmix=asked.cutmix,
        ratio=asked.mixup_ratio,
        mixup_alpha=asked.mixup_alpha,
        cutmix_alpha=asked.cutmix_alpha,
        multi_scale=asked.multi_scale,
        seed=derive_seed(session.config.data.seed, "batches"),
    )
