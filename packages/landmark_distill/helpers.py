"""What a run is made of: loaders, student, teacher, optimizer, each from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from landmark_distill.backbones import normalisation
from landmark_distill.config import (
    AUTO,
    BACKBONES,
    DistillConfig,
    NetworkConfig,
    RunConfig,
    TrainConfig,
    ViewConfig,
)
from landmark_distill.head.distillation import KDSettings
from landmark_distill.images.landmark_data import LandmarkData
from landmark_distill.images.views import ViewLoader, eval_loader, train_loader, view_settings
from landmark_distill.model import EmbeddingModel, load_weights, share_head
from landmark_distill.model_files import build, check_channels, read_head, read_model
from landmark_distill.optimizers import body_rates, build_optimizer
from landmark_distill.starting import Start, start_model, swin_layout
from landmark_distill.teacher import Live, Stored, Teacher
from shared_core.datasets import EpochOrder, EvalView, ImageSet, TrainView
from shared_core.for_torch.distributed import World
from shared_core.for_torch.precision import Precision, computes_bf16
from shared_core.runs import UsageError, derive_seed

SMALLEST_BF16 = 64  # pixels
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


# -- images ---------------------------------------------------------------------------------------


def training_view(views: ViewConfig) -> TrainView | EvalView:
    """What training sees of an image."""
    return view_settings(
        views.size,
        augment=views.augment,
        crop_scale=views.crop_scale,
        hflip=views.hflip,
        seed=derive_seed(views.seed, "views") % 2**31,
        method=views.resize,
    )


def view_identity(views: ViewConfig) -> dict[str, object]:
    """What decides a training view's pixels and channels: part of a store's name."""
    return {
        **training_view(views).settings(),
        "lighting": views.lighting if views.augment else 0.0,
        "lighting_order": views.lighting_order,
        "bgr": views.bgr,
    }


def make_train_loader(config: RunConfig, images: ImageSet, world: World) -> ViewLoader:
    """Shuffled batches of this process; those of all processes together are ``batch_size``."""
    views = config.views
    return train_loader(
        images,
        view=training_view(views),
        batch_size=config.train.batch_size // world.world_size,
        seed=derive_seed(config.train.seed, "order") % 2**31,
        device=world.device,
        threads=config.data.threads,
        views=views.views or (0 if views.augment else 1),
        rank=world.rank,
        world_size=world.world_size,
        lighting=views.lighting,
        lighting_order=views.lighting_order,
        bgr=views.bgr,
        mean=views.mean,
        std=views.std,
    )


def make_eval_loader(config: RunConfig, images: ImageSet, world: World) -> ViewLoader:
    """Every image once, in order; several processes share them out."""
    order = EpochOrder(len(images), shuffle=False, rank=world.rank, world_size=world.world_size)
    return eval_loader(
        images,
        image_size=config.views.size,
        batch_size=max(1, config.train.batch_size // world.world_size),
        device=world.device,
        threads=config.data.threads,
        bgr=config.views.bgr,
        method=config.views.resize,
        order=order,
        mean=config.views.mean,
        std=config.views.std,
    )


def unseen_loader(config: RunConfig, data: LandmarkData, world: World) -> ViewLoader | None:
    """The unseen classes that choose the best epoch; None where accuracy does.

    Raises:
        UsageError: the split keeps no such classes.
    """
    asked = config.train.choose_by
    if asked == "accuracy" or (asked == AUTO and data.tuning is None):
        return None
    if data.tuning is None:
        raise UsageError(
            "--choose_by unseen: the split has no validation classes apart from those that are "
            "tested, expected --validation_share above 0 or --choose_by accuracy"
        )
    return make_eval_loader(config, data.tuning, world)


def precision_of(config: RunConfig, device: torch.device) -> str:
    """``auto`` made out; bf16 convolutions of maps of one pixel can give NaN on a processor."""
    if config.train.amp != AUTO:
        return config.train.amp
    large = config.views.size >= SMALLEST_BF16
    return "bf16" if large and computes_bf16(device) else "fp32"


# -- networks -------------------------------------------------------------------------------------


def prepare_teacher(config: RunConfig, world: World) -> Teacher:
    """The teacher of a distilled run, with its head.

    A file of this project says how its network is built; another one is built with the run's
    image size and feature length. Every weight must fit.

    Raises:
        UsageError: another network than the options say, or other features.
        ValueError: weights that do not fit, or a file without a head.
    """
    asked = config.distill
    if asked is None:
        raise ValueError("the run has no teacher, expected a distilled run")
    weights, facts = read_model(asked.weights)
    network = teacher_network(config.network, asked, facts)
    if facts is not None and not config.fill_knowledge:
        check_channels(asked.weights, facts, bgr=config.views.bgr)
    model = build(network, num_classes=None)
    if facts is None and network.name in BACKBONES:  # Microsoft's names and timm's
        weights = swin_layout(weights, merge_first=False)
    load_weights(model.encoder, weights, source=str(asked.weights))
    head = read_head(
        asked.weights,
        mapped=asked.mapped_head,
        dtype=None if asked.mapped_head else DTYPES[asked.head_dtype],
        scale=network.scale,
        margin=network.margin,
    )
    share_head(model, head)
    model.encoder.to(world.device)
    if not asked.mapped_head and model.head is not None:
        model.head.to(world.device)
    names = tuple(facts["class_names"]) if facts else ()
    mean, std = (facts["mean"], facts["std"]) if facts else normalisation(network.name)
    return Teacher(
        model,
        Precision(world.device, precision_of(config, world.device)),
        class_names=names,
        change=change_of(config.views, mean=mean, std=std),
        start=dict(facts.get("start") or {}) if facts else {},
    )


def change_of(
    views: ViewConfig, *, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """Factor and summand, ``(3, 1, 1)`` each, that turn a student's pixels into a teacher's.

    None where both are used to the same mean and deviation (RGB in [0, 1]).
    """
    if (tuple(mean), tuple(std)) == (tuple(views.mean), tuple(views.std)):
        return None
    theirs, ours = torch.tensor([mean, std]), torch.tensor([views.mean, views.std])
    change = torch.stack([ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]])
    factor, summand = (change.flip(1) if views.bgr else change)[:, :, None, None]
    return factor, summand


def teacher_network(
    student: NetworkConfig, asked: DistillConfig, facts: dict[str, Any] | None
) -> NetworkConfig:
    """How the teacher is built: as its file says, or with the student's sizes.

    Raises:
        UsageError: the file holds another network than the options say, or other features.
    """
    if facts is not None:
        network = NetworkConfig.of_file(facts["network"])
    else:
        same = asked.backbone == student.name
        options = student.options if same else {}
        network = replace(student, name=asked.backbone, options=options)
    if network.name != asked.backbone:
        raise UsageError(
            f"--teacher_backbone_class {asked.backbone}, {asked.weights} holds a {network.name}: "
            "expected that"
        )
    if network.feature_dim != student.feature_dim:
        raise UsageError(
            f"--feature_dim {student.feature_dim}, the teacher of {asked.weights} makes "
            f"{network.feature_dim} features: expected as many"
        )
    return network


def prepare_student(
    config: RunConfig, data: LandmarkData, world: World, teacher: Teacher | None
) -> tuple[EmbeddingModel, Start]:
    """The network that learns, on its device, with its own head or the teacher's; its start.

    Raises:
        UsageError: no such weights to start from, or a body to freeze that is not trained.
        ValueError: weights to start from that do not fit.
    """
    shared = config.distill is not None and config.distill.head_fixed
    model = build(config.network, num_classes=None if shared else data.num_classes)
    if shared and teacher is not None:
        share_head(model, teacher.model)
    start = start_model(model, config.network, config.train.init, bgr=config.views.bgr)
    if config.train.freeze_body:
        if not start.facts:
            raise UsageError(f"--freeze_body: {config.network.name} {start.line}")
        model.freeze_body()
    bn = config.train.freeze_bn
    if bn == "yes" or (bn == AUTO and start.trained_body):
        model.freeze_norms()
    model.set_checkpointing(config.train.checkpointing)
    memory = torch.channels_last if config.train.channels_last else torch.preserve_format
    model.encoder.to(world.device, memory_format=memory)
    if model.head is not None and not shared:
        model.head.to(world.device)
    return model, start


def prepare_optimizer(
    train: TrainConfig, model: EmbeddingModel, start: Start
) -> torch.optim.Optimizer:
    """Over what learns: never a fixed head, never the teacher; a trained body more slowly."""
    rates = None
    if start.trained_body:
        rates = body_rates(model.body, rate=train.body_rate, layer_decay=train.layer_decay)
    return build_optimizer(
        train.optimizer,
        model.named_parameters(),
        lr=train.schedule.lr,
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        decay_on=train.decay_on,
        rates=rates,
    )


# -- the teacher's answers ------------------------------------------------------------------------


def make_source(
    config: RunConfig, teacher: Teacher | None, data: LandmarkData, world: World
) -> Live | Stored | None:
    """Where the teacher's outputs come from: None without one; asked live; or from a store."""
    asked = config.distill
    if teacher is None or asked is None:
        return None
    if asked.store is None:
        return Live(teacher)
    if data.train is None:
        raise ValueError("no training images whose teacher outputs could be stored")
    return Stored(
        asked.store,
        teacher,
        kind=asked.store_kind,
        keys=[str(key) for key in data.train.keys],
        view=view_identity(config.views),
        kd=KDSettings(asked.variant, asked.temperature),
        top_k=asked.top_k,
        writable=world.world_size == 1,
    )
