"""Model files: what ``max_acc.pth`` holds, and how a network is built again from it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from landmark_distill.config import NetworkConfig, ViewConfig
from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.model import EmbeddingModel, build_model, load_weights
from shared_core.checkpoints import CheckpointError, make_facts
from shared_core.for_torch.checkpoints import load_checkpoint, load_foreign_weights, save_checkpoint

PROJECT = "landmark_distill"
TEACHER = "teacher."
WRAPPERS = ("model_state", "state_dict", "params", "model")  # what weights may lie under


def build(network: NetworkConfig | Mapping[str, Any], *, num_classes: int | None) -> EmbeddingModel:
    """A network as configured, or as a file's facts say, with a new head of ``num_classes`` rows.

    Args:
        num_classes: None for no head.
    """
    if not isinstance(network, NetworkConfig):
        network = NetworkConfig.of_file(network)
    return build_model(
        network.name,
        num_classes=num_classes,
        image_size=network.image_size,
        feature_dim=network.feature_dim,
        scale=network.scale,
        margin=network.margin,
        **network.options,
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
    network: NetworkConfig,
    class_names: list[str],
    epoch: int,
    metrics: Mapping[str, float],
    split_hash: str | None,
    config: Mapping[str, Any],
    views: ViewConfig,
    start: Mapping[str, Any],
) -> dict[str, Any]:
    """Write weights (``encoder.*``, maybe ``head.weight`` and ``teacher.*``) with their facts.

    Args:
        start: where the first weights came from; empty: from nothing.
    """
    size = network.image_size
    facts = make_facts(
        project=PROJECT,
        architecture=network.name,
        class_names=class_names,
        framework="torch",
        input_size=(3, size, size),
        mean=views.mean,
        std=views.std,
        epoch=epoch,
        metrics=metrics,
        split_hash=split_hash,
        config=config,
        network=network.as_dict(),
        bgr=views.bgr,
        resize=views.resize,
        start=start,
    )
    return save_checkpoint(path, weights, facts)


def read_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights of a file without those of a teacher, and its facts; None for a foreign file.

    A file of this project is checked against its sum. Any other (a state dict, maybe under
    ``model_state``, ``state_dict``, ``params`` or ``model``) has no facts.

    Raises:
        FileNotFoundError, CheckpointError: missing, damaged, hostile, or of another project.
    """
    own = read_own(path)
    if own is not None:
        return own
    weights = _foreign(Path(path))
    return {k: v for k, v in weights.items() if not k.startswith(TEACHER)}, None


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
    path: str | Path, *, network: NetworkConfig | None = None
) -> tuple[EmbeddingModel, dict[str, Any] | None]:
    """The network of a file with its weights, and the head when the file holds one.

    Args:
        network: how to build it when the file does not say.

    Raises:
        ValueError: weights that do not fit, or a foreign file and no ``network``.
    """
    weights, facts = read_model(path)
    if facts is not None:
        network = NetworkConfig.of_file(facts["network"])
    elif network is None:
        raise ValueError(f"{path} does not say what network it is of: expected a file of this one")
    heads = [value for name, value in weights.items() if is_head(name)]
    model = build(network, num_classes=len(heads[0]) if heads else None)
    load_weights(model, weights, source=str(path))
    return model, facts


def is_head(name: str) -> bool:
    """Whether a weight of this name is a head's; ``conv_head.weight`` of a body is none."""
    return name.split(".")[-2:] == ["head", "weight"]


def read_own(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and facts of a file of this project; None for a foreign one.

    Raises:
        FileNotFoundError, CheckpointError: missing, damaged, hostile, or of another project.
    """
    try:
        weights, facts = load_checkpoint(path, project=PROJECT)
    except CheckpointError as error:
        if "facts" not in str(error) and "schema" not in str(error):
            raise
        return None
    return {k: v for k, v in weights.items() if not k.startswith(TEACHER)}, facts


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


def read_head(
    path: str | Path, *, mapped: bool, dtype: torch.dtype | None, scale: float, margin: float
) -> CosineMarginHead:
    """The head of a model file, frozen: the tensor whose name ends in ``head.weight``.

    Args:
        path: of this project or a foreign one, torch's format or safetensors; in torch's the
            weights may lie under ``model``, ``model_state``, ``state_dict`` or ``params``.
        mapped: read on demand, shared between processes, never written back. Not with ``dtype``.
        dtype: convert, which reads it all; None for the file's own.
        scale, margin: of the head.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no head in it, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a head")
    try:
        weight = _head_weight(path)
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, OSError) as error:
        line = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as weights: {line}") from error
    if weight is None:
        raise ValueError(f"{path}: holds no head, expected a tensor named ...head.weight")
    if dtype is not None:
        weight = weight.to(dtype)
    elif not mapped:
        weight = weight.clone()
    return CosineMarginHead.around(weight, scale=scale, margin=margin)


def _head_weight(path: Path) -> Tensor | None:
    """Mapped by the libraries, and nothing in the file is executed."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if is_head(name)]  # noqa: SIM118
            return file.get_tensor(names[0]) if names else None
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    names = [n for n in state if is_head(n)] if isinstance(state, dict) else []
    return state[names[0]] if names else None
