"""Model files: what ``max_acc.pth`` holds, and how a network is built again from it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landmark_distill.model import EmbeddingModel, build_model, load_weights
from landmark_distill.options import NETWORK
from shared_core.checkpoints import CheckpointError, make_facts
from shared_core.for_torch.checkpoints import load_checkpoint, load_foreign_weights, save_checkpoint
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD

PROJECT = "landmark_distill"
TEACHER = "teacher."


def network_of(args: argparse.Namespace, *, name: str | None = None) -> dict[str, Any]:
    """What :func:`build` needs to know of the options' network.

    Args:
        name: another backbone than the options'; it then has its own defaults.
    """
    other = name is not None and name != args.backbone_class
    options = {key: None if other else getattr(args, key) for key in NETWORK}
    return {
        "name": name or args.backbone_class,
        "image_size": args.image_size,
        "feature_dim": args.feature_dim,
        "scale": args.cos_scale,
        "margin": args.cos_margin,
        "options": {key: value for key, value in options.items() if value is not None},
    }


def build(network: Mapping[str, Any], *, num_classes: int | None) -> EmbeddingModel:
    """The network of :func:`network_of`, with a new head of ``num_classes`` rows or none."""
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in network["options"].items()
    }
    return build_model(
        network["name"],
        num_classes=num_classes,
        image_size=network["image_size"],
        feature_dim=network["feature_dim"],
        scale=network["scale"],
        margin=network["margin"],
        **options,
    )


def student_weights(model: EmbeddingModel, *, whole: bool = False) -> dict[str, Tensor]:
    """Weights of the student alone: its encoder, and its head when that is its own.

    Args:
        whole: a shared head as well.
    """
    head = model.head is not None and (whole or not model.head.frozen)
    return {
        name: value
        for name, value in model.state_dict().items()
        if head or not name.startswith("head.")
    }


def save_model(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    network: Mapping[str, Any],
    class_names: list[str],
    epoch: int,
    metrics: Mapping[str, float],
    split_hash: str | None,
    config: Mapping[str, Any],
    bgr: bool,
    resize: str,
) -> dict[str, Any]:
    """Write weights (``encoder.*``, maybe ``head.weight`` and ``teacher.*``) with their facts."""
    size = int(network["image_size"])
    facts = make_facts(
        project=PROJECT,
        architecture=network["name"],
        class_names=class_names,
        framework="torch",
        input_size=(3, size, size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        epoch=epoch,
        metrics=metrics,
        split_hash=split_hash,
        config=config,
        network=dict(network),
        bgr=bgr,
        resize=resize,
    )
    return save_checkpoint(path, weights, facts)


def read_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights of a file without those of a teacher, and its facts; None for a foreign file.

    A file of this project is checked against its sum. Any other (a state dict, maybe under
    ``model_state``, ``state_dict``, ``params`` or ``model``) has no facts.

    Raises:
        FileNotFoundError, CheckpointError: missing, damaged, hostile, or of another project.
    """
    try:
        weights, facts = load_checkpoint(path, project=PROJECT)
    except CheckpointError as error:
        if "facts" not in str(error) and "schema" not in str(error):
            raise
        weights, facts = _foreign(Path(path)), None
    return {k: v for k, v in weights.items() if not k.startswith(TEACHER)}, facts


def _foreign(path: Path) -> dict[str, Tensor]:
    """A published file: the original keeps its weights under ``params`` or ``model_state``."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the core's reader below says what is wrong with the file
        return load_foreign_weights(path)
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        found = {k: v for k, v in content["params"].items() if isinstance(v, Tensor)}
        students = {k: v for k, v in found.items() if not k.startswith(("teacher", "distill"))}
        return students
    return load_foreign_weights(path)


def load_model(
    path: str | Path, *, network: Mapping[str, Any] | None = None
) -> tuple[EmbeddingModel, dict[str, Any] | None]:
    """The network of a file with its weights, and the head when the file holds one.

    Args:
        network: how to build it (see :func:`network_of`) when the file does not say.

    Raises:
        ValueError: weights that do not fit, or a foreign file and no ``network``.
    """
    weights, facts = read_model(path)
    if facts is not None:
        network = facts["network"]
    elif network is None:
        raise ValueError(f"{path} does not say what network it is of: expected a file of this one")
    heads = [value for name, value in weights.items() if name.endswith("head.weight")]
    model = build(network, num_classes=len(heads[0]) if heads else None)
    load_weights(model, weights, source=str(path))
    return model, facts


def load_start(model: EmbeddingModel, path: str | Path, *, bgr: bool) -> None:
    """``--init_weights``: every weight of the network must be in the file and fit.

    The head is taken when the model has a head of its own and the file has one; a file without a
    head leaves a new head as it is drawn. A shared head is never touched.

    Raises:
        ValueError: weights are missing, not known, or of another shape; the first are named; or
            the file's network learned from another order of the channels than ``bgr`` says.
    """
    weights, facts = read_model(path)
    check_channels(path, facts, bgr=bgr)
    has_head = any(name.endswith("head.weight") for name in weights)
    own_head = model.head is not None and not model.head.frozen
    target: nn.Module = model if has_head and own_head else model.encoder
    load_weights(target, weights, source=str(path))


def check_channels(path: str | Path, facts: Mapping[str, Any] | None, *, bgr: bool) -> None:
    """A network sees the channels in the order that it learned them in.

    Raises:
        ValueError: the file says another order than the options.
    """
    if facts is not None and bool(facts["bgr"]) != bgr:
        saw = "blue first" if facts["bgr"] else "red first"
        raise ValueError(
            f"{path} learned from images with {saw}: expected "
            + ("--bgr" if facts["bgr"] else "no --bgr")
        )
