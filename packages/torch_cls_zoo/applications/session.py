"""What all modes start from: the data, the network with its weights, and how to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shared_core.checkpoints import CheckpointError
from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, load_foreign_weights
from shared_core.for_torch.distributed import World, main_works
from shared_core.weights.finding import NONE
from torch_cls_zoo.config import Config, DataSettings, NetworkSettings
from torch_cls_zoo.criterions import Criterion, build_criterion, load_matrices
from torch_cls_zoo.dataloader.folders import check_classes, open_data
from torch_cls_zoo.dataloader.loaders import InputSettings
from torch_cls_zoo.models.build import build_model, lacking_weights, takes_drop_path
from torch_cls_zoo.options import DEFAULT_ARCH

PROJECT = "torch_cls_zoo"
DEFAULT_SIZE = (224, 224)  # pixels
LARGEST_BATCH = 256  # by default
HALF = (0.5, 0.5, 0.5)  # mean and deviation that make 2 x - 1 of pixels in [0, 1]
T = TypeVar("T")


@dataclass
class Session:
    """Data, network and settings of a command."""

    config: Config
    world: World
    data: PreparedData
    settings: InputSettings
    model: nn.Module
    arch: str
    batch_size: int  # of this process
    facts: dict[str, Any]  # of the weights that were loaded; empty for none
    kept: dict[str, Any]  # channels that a pruned network kept; empty for a whole one
    start: dict[str, Any]  # where the first weights of a training are from; empty: random

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.data.classes

    @property
    def output(self) -> Path:
        """The run's folder."""
        return self.config.run.output

    @property
    def family(self) -> str:
        """``softmax`` or ``bce``: what the logits mean."""
        known = self.facts.get("config", {}).get("criterion")
        return str(self.config.loss.criterion or known or "softmax")

    def say(self, text: str) -> None:
        """One line for the user, from the main process only."""
        if self.world.is_main:
            print(text, flush=True)

    def only_main(self, write: Callable[[], T]) -> T:
        """Run ``write``, which may take long, in the main process; the others get its answer."""
        return main_works(write, self.world)


def open_session(config: Config, world: World, *, data: PreparedData | None = None) -> Session:
    """Read the data and build the network; errors of a user come before any long work.

    Args:
        data: images that are open already; those of the settings are read otherwise.

    Raises:
        ValueError, FileNotFoundError: see :func:`open_data`, :func:`build_model`, and weights of
            another network or other classes.
    """
    asked, network = config.data, config.network
    learning = "train" in config.run.modes or "find_lr" in config.run.modes
    weights, facts = (None, {}) if learning else read_weights(network)
    size = _image_size(asked, facts)
    if data is None:
        data = main_works(lambda: _opened(asked, config.run.output, size), world)
    if facts.get("class_names"):
        check_classes(data.classes, facts["class_names"], str(network.resume))
    arch = network.arch or facts.get("architecture") or _arch_of(network.resume)
    built = build_model(
        arch,
        num_classes=len(data.classes),
        init=(network.resume or network.init) if learning else NONE,
        image_size=size,
        kept=facts.get("pruned"),
        drop_path=_drop_path(config, arch) if learning else 0.0,
    )
    if weights is not None:
        fit_into(built.model, weights, path=network.resume)
    mean, std = tuple(built.mean), tuple(built.std)
    if network.advprop:
        mean = std = HALF
    elif facts.get("mean") and facts.get("std"):
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
    images = len(data.manifest.subset("train"))
    session = Session(
        config.for_images(images) if learning else config,
        world,
        data,
        InputSettings(size, mean, std),
        built.model.to(memory_format=torch.channels_last).to(world.device),
        arch,
        asked.batch_size or max(1, min(LARGEST_BATCH, images // 4)),
        facts,
        built.kept,
        built.start,
    )
    for note in built.notes:
        session.say(f"note: {note}")
    return session


def _opened(asked: DataSettings, output: Path, size: tuple[int, int]) -> PreparedData:
    return open_data(
        asked.data,
        output,
        num_classes=asked.num_classes,
        seed=asked.seed,
        quarantine=asked.quarantine,
        split=asked.split,
        image_side=min(size),
    )


def read_weights(network: NetworkSettings) -> tuple[Any, dict[str, Any]]:
    """Weights and facts of ``--resume``; where nothing is trained they decide the network.

    Raises:
        ValueError: the file and ``--arch`` name different networks, or neither names one.
    """
    if network.resume is None:
        return None, {}
    try:
        weights, facts = load_checkpoint(network.resume, project=PROJECT)
    except CheckpointError as error:
        if "holds no facts" not in str(error):
            raise
        if network.arch is None:
            raise ValueError(
                f"{network.resume}: says nothing of its network, expected --arch beside it"
            ) from None
        return load_foreign_weights(network.resume), {}
    if network.arch is not None and network.arch != facts["architecture"]:
        raise ValueError(
            f"{network.resume}: holds {facts['architecture']}, --arch says {network.arch}"
        )
    return weights, facts


def _drop_path(config: Config, arch: str) -> float:
    """The rate asked for; that of a recipe only for networks that have a place for it."""
    if config.network.drop_path == 0:
        return 0.0
    if config.values["drop_path"] is None and not takes_drop_path(arch):
        return 0.0
    return config.network.drop_path


def settled(config: Config, world: World) -> tuple[Config, str | None]:
    """The command with ``--init none`` where it names no weights and none can be had, and why."""
    if not config.may_do_without:
        return config, None
    lacking = main_works(lambda: lacking_weights(config.network.arch or DEFAULT_ARCH), world)
    return (config, None) if lacking is None else (config.from_nothing(), lacking)


def _arch_of(file: str | None) -> str:
    """The network of a checkpoint that a training starts from; the usual one without its name."""
    if file is not None:
        try:
            return str(load_checkpoint(file)[1]["architecture"])
        except CheckpointError:  # somebody else's file of weights: whether it fits is told later
            pass
    return DEFAULT_ARCH


def _image_size(asked: DataSettings, facts: dict[str, Any]) -> tuple[int, int]:
    if asked.image_size is not None:
        return asked.image_size
    known = facts.get("input_size")
    return (int(known[1]), int(known[2])) if known else DEFAULT_SIZE


def criterion_of(session: Session, *, plain: bool = False) -> Criterion:
    """The loss that the flags ask for, on the session's device; ``plain`` without its weights.

    Raises:
        ValueError: matrices that are missing or of another size.
    """
    asked, classes = session.config.loss, session.classes
    wanted = {
        "weighted": asked.weighted_loss,
        "threshold": asked.threshold_loss,
        "ohm": asked.ohm_loss,
        "ghm": asked.ghm_loss,
    }
    names = [name for name, on in wanted.items() if on and not plain]
    matrices = None
    if asked.class_matrices is not None:
        matrices = load_matrices(asked.class_matrices, num_classes=len(classes), classes=classes)
    if "weighted" in names and matrices is None:
        raise ValueError("--weighted_loss needs a matrix: name its file by --class_matrices")
    made = build_criterion(
        names,
        family=session.family,
        num_classes=len(classes),
        matrices=matrices,
        hard_ratio=asked.hard_ratio,
        ghm_counts=asked.ghm_counts,
        smoothing=0.0 if plain else asked.label_smoothing,
    )
    return made.to(session.world.device)
