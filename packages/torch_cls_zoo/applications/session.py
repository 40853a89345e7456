"""What all modes start from: the data, the network with its weights, and how to feed it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shared_core.checkpoints import CheckpointError
from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, load_foreign_weights
from shared_core.for_torch.distributed import World, main_writes
from torch_cls_zoo.config import DEFAULT_ARCH
from torch_cls_zoo.criterions import Criterion, build_criterion, load_matrices
from torch_cls_zoo.dataloader.folders import check_classes, open_data
from torch_cls_zoo.dataloader.loaders import InputSettings
from torch_cls_zoo.dataloader.preprocess import normalization
from torch_cls_zoo.models import build_model

PROJECT = "torch_cls_zoo"
DEFAULT_SIZE = (224, 224)  # pixels
T = TypeVar("T")


@dataclass
class Session:
    """Data, network and settings of a command."""

    args: argparse.Namespace
    world: World
    data: PreparedData
    settings: InputSettings
    model: nn.Module
    arch: str
    facts: dict[str, Any]  # of the weights that were loaded; empty for none
    kept: dict[str, Any]  # channels that a pruned network kept; empty for a whole one

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.data.classes

    @property
    def batch_size(self) -> int:
        """Images a batch of this process."""
        return int(self.args.batch_size)

    @property
    def threads(self) -> int | None:
        """Threads that decode; None for the loader's own choice."""
        return None if self.args.workers is None else int(self.args.workers)

    @property
    def family(self) -> str:
        """``softmax`` or ``bce``: what the logits mean."""
        known = self.facts.get("config", {}).get("criterion")
        return str(self.args.criterion or known or "softmax")

    def say(self, text: str) -> None:
        """One line for the user, from the main process only."""
        if self.world.is_main:
            print(text, flush=True)


def only_main(world: World, write: Callable[[], T]) -> T:
    """Run ``write`` in the main process; the others wait and get its answer."""
    return main_writes(write, world)


def open_session(
    args: argparse.Namespace, world: World, *, data: PreparedData | None = None
) -> Session:
    """Read the data and build the network; errors of a user come before any long work.

    Args:
        data: images that are open already; ``--data`` is read otherwise.

    Raises:
        ValueError, FileNotFoundError: see :func:`open_data`, :func:`build_model`, and weights of
            another network or other classes.
    """
    learning = args.train or bool(args.find_lr)
    weights, facts = (None, {}) if learning else _read_weights(args)
    arch = args.arch or facts.get("architecture") or DEFAULT_ARCH
    size = _image_size(args, facts)
    if data is None:
        number, seed, where = args.num_classes, args.seed, args.output
        data = only_main(world, lambda: _opened(args, where, number, seed, size))
    if facts.get("class_names"):
        check_classes(data.classes, facts["class_names"], str(args.resume))
    built = build_model(
        arch,
        num_classes=len(data.classes),
        pretrained=(args.resume or args.pretrained) if learning else None,
        image_size=size,
        kept=facts.get("pruned"),
    )
    if weights is not None:
        fit_into(built.model, weights, path=args.resume)
    mean, std = _normalization(args, facts, tuple(built.mean), tuple(built.std))
    model = built.model.to(memory_format=torch.channels_last)
    session = Session(
        args,
        world,
        data,
        InputSettings(size, mean, std),
        model.to(world.device),
        arch,
        facts,
        dict(built.kept or {}),
    )
    for note in built.notes:
        session.say(f"note: {note}")
    if args.batch_size is None:
        args.batch_size = max(1, min(256, len(data.manifest.subset("train")) // 4))
    return session


def _opened(
    args: argparse.Namespace, output: Path, number: int | None, seed: int, size: tuple[int, int]
) -> PreparedData:
    return open_data(
        args.data,
        output,
        num_classes=number,
        seed=seed,
        quarantine=args.quarantine,
        image_side=min(size),
    )


def _read_weights(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Weights and facts of ``--resume``; where nothing is trained they decide the network."""
    if args.resume is None:
        return None, {}
    try:
        weights, facts = load_checkpoint(args.resume, project=PROJECT)
    except CheckpointError as error:
        if "holds no facts" not in str(error):
            raise
        if args.arch is None:
            raise ValueError(
                f"{args.resume}: says nothing of its network, expected --arch beside it"
            ) from None
        return load_foreign_weights(args.resume), {}
    if args.arch is not None and args.arch != facts["architecture"]:
        raise ValueError(f"{args.resume}: holds {facts['architecture']}, --arch says {args.arch}")
    return weights, facts


def _image_size(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[int, int]:
    if args.image_size is not None:
        return (int(args.image_size[0]), int(args.image_size[1]))
    known = facts.get("input_size")
    return (int(known[1]), int(known[2])) if known else DEFAULT_SIZE


def _normalization(
    args: argparse.Namespace,
    facts: dict[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if args.advprop:
        return normalization(True)
    if facts.get("mean") and facts.get("std"):
        return tuple(facts["mean"]), tuple(facts["std"])
    return mean, std


def criterion_of(session: Session, *, plain: bool = False) -> Criterion:
    """The loss that the flags ask for, on the session's device; ``plain`` without its weights.

    Raises:
        ValueError: matrices that are missing or of another size.
    """
    args, classes = session.args, session.classes
    names = [
        name for name in ("weighted", "threshold", "ohm", "ghm") if getattr(args, f"{name}_loss")
    ]
    matrices = None
    if args.class_matrices is not None:
        matrices = load_matrices(args.class_matrices, num_classes=len(classes), classes=classes)
    if "weighted" in names and matrices is None:
        raise ValueError("--weighted_loss needs a matrix: name its file by --class_matrices")
    made = build_criterion(
        [] if plain else names,
        family=session.family,
        num_classes=len(classes),
        matrices=matrices,
        hard_ratio=args.hard_ratio,
    )
    return made.to(session.world.device)
