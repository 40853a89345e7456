"""What a run is made of: loaders, student, teacher, optimizer, each from the options."""

from __future__ import annotations

import argparse

import torch

from landmark_distill.data_loader import ViewLoader, eval_loader, train_loader, view_settings
from landmark_distill.head_file import head_from_file
from landmark_distill.landmark_data import LandmarkData
from landmark_distill.model import EmbeddingModel, load_weights, share_head
from landmark_distill.model_files import (
    build,
    check_channels,
    load_start,
    network_of,
    read_model,
)
from landmark_distill.optimizers import build_optimizer
from landmark_distill.teacher import Teacher
from shared_core.datasets import EpochOrder, EvalView, ImageSet, TrainView
from shared_core.for_torch.distributed import World
from shared_core.for_torch.precision import Precision
from shared_core.runs import UsageError, derive_seed

HEAD_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def training_view(args: argparse.Namespace) -> TrainView | EvalView:
    """What training sees of an image."""
    return view_settings(
        args.image_size,
        augment=args.augment,
        crop_scale=tuple(args.crop_scale),
        hflip=args.hflip,
        seed=derive_seed(args.view_seed, "views") % 2**31,
        method=args.resize,
    )


def view_identity(args: argparse.Namespace) -> dict[str, object]:
    """What decides a training view's pixels and channels: part of a store's name."""
    return {
        **training_view(args).settings(),
        "lighting": args.lighting if args.augment else 0.0,
        "lighting_order": args.lighting_order,
        "bgr": args.bgr,
    }


def make_train_loader(args: argparse.Namespace, images: ImageSet, world: World) -> ViewLoader:
    """Shuffled batches of this process; those of all processes together are ``--batch_size``."""
    return train_loader(
        images,
        view=training_view(args),
        batch_size=args.batch_size // world.world_size,
        seed=derive_seed(args.seed, "order") % 2**31,
        device=world.device,
        threads=args.num_workers,
        views=args.views or (0 if args.augment else 1),
        rank=world.rank,
        world_size=world.world_size,
        lighting=args.lighting,
        lighting_order=args.lighting_order,
        bgr=args.bgr,
    )


def make_eval_loader(args: argparse.Namespace, images: ImageSet, world: World) -> ViewLoader:
    """Every image once, in order; several processes share them out."""
    order = EpochOrder(len(images), shuffle=False, rank=world.rank, world_size=world.world_size)
    return eval_loader(
        images,
        image_size=args.image_size,
        batch_size=max(1, args.batch_size // world.world_size),
        device=world.device,
        threads=args.num_workers,
        bgr=args.bgr,
        method=args.resize,
        order=order,
    )


def prepare_teacher(args: argparse.Namespace, world: World) -> Teacher:
    """The teacher of ``--teacher_init_weights`` with its head.

    A file of this project says how its network is built; another one is built with the run's
    image size and feature length. Every weight must fit.

    Raises:
        UsageError: another network than ``--teacher_backbone_class``, or other features.
        ValueError: weights that do not fit, or a file without a head.
    """
    path = args.teacher_init_weights
    weights, facts = read_model(path)
    network = facts["network"] if facts else network_of(args, name=args.teacher_backbone_class)
    if network["name"] != args.teacher_backbone_class:
        raise UsageError(
            f"--teacher_backbone_class {args.teacher_backbone_class}, {path} holds a "
            f"{network['name']}: expected that"
        )
    if network["feature_dim"] != args.feature_dim:
        raise UsageError(
            f"--feature_dim {args.feature_dim}, the teacher of {path} makes "
            f"{network['feature_dim']} features: expected as many"
        )
    if not args.fill_knowledge and facts is not None:
        check_channels(path, facts, bgr=args.bgr)
    model = build(network, num_classes=None)
    load_weights(model.encoder, weights, source=str(path))
    head = head_from_file(
        path,
        mmap=args.mapped_head,
        dtype=None if args.mapped_head else HEAD_DTYPES[args.head_dtype],
        scale=network["scale"],
        margin=network["margin"],
    )
    share_head(model, head)
    if not args.mapped_head:
        model.to(world.device)
    else:
        model.encoder.to(world.device)
    return Teacher(model, Precision(world.device, args.amp))


def prepare_student(
    args: argparse.Namespace, data: LandmarkData, world: World, teacher: Teacher | None
) -> EmbeddingModel:
    """The network that learns, on its device, with its own head or the teacher's.

    Raises:
        ValueError: ``--init_weights`` that do not fit; more classes than the teacher's head knows.
    """
    shared = teacher is not None and args.head_fixed
    rows = data.num_classes
    if teacher is not None and args.kd_loss == "KD" and teacher.head.num_classes != rows:
        if not shared and args.num_classes is None:
            rows = teacher.head.num_classes
    if teacher is not None and teacher.head.num_classes < data.num_classes:
        raise ValueError(
            f"the teacher's head knows {teacher.head.num_classes} classes, the data have "
            f"{data.num_classes}: expected at least as many"
        )
    model = build(network_of(args), num_classes=None if shared else rows)
    if shared and teacher is not None:
        share_head(model, teacher.model)
    if args.init_weights is not None:
        load_start(model, args.init_weights, bgr=args.bgr)
    model.set_checkpointing(args.grad_checkpointing)
    memory = torch.channels_last if args.channels_last else torch.preserve_format
    model.encoder.to(world.device, memory_format=memory)
    if model.head is not None and not shared:
        model.head.to(world.device)
    return model


def prepare_optimizer(args: argparse.Namespace, model: EmbeddingModel) -> torch.optim.Optimizer:
    """Over what learns: never a fixed head, never the teacher."""
    return build_optimizer(
        args.optim,
        model.named_parameters(),
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum if args.optim == "SGD" else 0.0,
        decay_on=args.weight_decay_on,
    )
