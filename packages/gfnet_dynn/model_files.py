"""Model files of this project: weights with the facts that rebuild the network and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfnet_dynn.data_loader_helper import Data
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.gfnet_pyramid import GFNetPyramid
from gfnet_dynn.models.named import NamedNetwork
from gfnet_dynn.models.staged import StagedNetwork
from gfnet_dynn.models.transfer import load_weights
from shared_core import checkpoints
from shared_core.for_torch.checkpoints import (
    fit_into,
    load_checkpoint,
    load_foreign_weights,
    save_checkpoint,
)
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD
from shared_core.for_torch.precision import computes_bf16
from shared_core.runs import UsageError

PROJECT = "gfnet_dynn"
PLAIN, PYRAMID, EXITS = "GFNet", "GFNetPyramid", "GFNetDynn"
NAMED, STAGED = "NamedNetwork", "StagedNetwork"
POLICIES = "exit_policies"  # the facts' entry: thresholds that the run's evaluation found


def save_model(
    path: Path,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    data: Data,
    epoch: int,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Write ``weights`` of ``model`` with everything that is needed to use them alone.

    Args:
        model: a network that this project builds: its sizes are written, not its own weights.
        metrics: of these weights; fractions in [0, 1].
        config: every option of the run.
        more: further facts, such as costs.

    Returns:
        The facts as written.
    """
    facts = checkpoints.make_facts(
        project=PROJECT,
        architecture=type(model).__name__,
        class_names=data.classes,
        framework="torch",
        input_size=(3, data.input_size, data.input_size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        epoch=epoch,
        metrics=metrics,
        split_hash=data.manifest.hash,
        config=config,
        model=model.config(),
        data=data.facts(),
        **more,
    )
    return save_checkpoint(path, weights, facts)


def load_model(path: Path, *, architecture: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the network of a file and fill it, in eval mode on the CPU.

    Raises:
        FileNotFoundError, CheckpointError: see ``shared_core.for_torch.checkpoints``.
    """
    weights, facts = load_checkpoint(path, project=PROJECT, architecture=architecture)
    try:
        kinds = {PLAIN: GFNet, PYRAMID: GFNetPyramid, NAMED: NamedNetwork, STAGED: StagedNetwork}
        if facts["architecture"] == EXITS:
            model: nn.Module = GFNetDynn.from_config(facts["model"])
        else:
            model = kinds[facts["architecture"]](**facts["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise checkpoints.CheckpointError(f"{path}: no network has its sizes: {error}") from None
    fit_into(model, weights, path=path)
    return model.eval(), facts


def add_policies(
    path: Path, *, points: Mapping[str, ExitPolicy], rules: Mapping[str, ExitPolicy], target: Path
) -> None:
    """Write the model file ``path`` as ``target`` with thresholds in its facts, weights as before.

    So a copy of the file knows who may leave where.

    Args:
        points: by wish (careful, balanced, fast).
        rules: the balanced policy of each kind.
    """
    weights, facts = load_checkpoint(path, project=PROJECT, architecture=EXITS)
    found = {"points": points, "rules": rules}
    states = {
        name: {key: policy.state_dict() for key, policy in policies.items()}
        for name, policies in found.items()
    }
    save_checkpoint(target, weights, {**facts, POLICIES: states})


def check_fits(path: Path, model: nn.Module, facts: Mapping[str, Any], data: Data) -> None:
    """Refuse a model of other classes, or of another input size, than the data.

    Raises:
        ValueError: which of them differs.
    """
    if tuple(facts["class_names"]) != data.classes:
        known, wanted = facts["class_names"], data.classes
        raise ValueError(
            f"{path} knows {len(known)} classes ({', '.join(known[:3])}...), the data has "
            f"{len(wanted)} ({', '.join(wanted[:3])}...)"
        )
    size = getattr(model, "backbone", model).img_size
    if size != (data.input_size, data.input_size):
        raise ValueError(
            f"{path} takes images of {size[0]} pixels, this run has {data.input_size}: expected "
            f"--input-size {size[0]}"
        )


def load_pretrained(path: Path, model: nn.Module, *, transfer: str = "official") -> bool:
    """Put an official file into a GFNet or pyramid; another input size is interpolated.

    Args:
        transfer: ``official`` or ``spectrum``, see :mod:`gfnet_dynn.models.transfer`.

    Returns:
        Whether the head was replaced, because it is one of other classes.

    Raises:
        CheckpointError, ValueError: no weights in the file, or weights of another architecture.
    """
    weights = load_foreign_weights(path)
    head = weights.get("head.weight")
    new_head = head is None or head.shape != model.head.weight.shape
    load_weights(model, weights, method=transfer, new_head=new_head)
    return new_head


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        ValueError: a device that torch does not know or that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r}: expected auto, cpu, cuda or cuda:<number>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here; expected cpu or auto")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """``auto`` takes bf16 where the hardware computes it natively, fp32 elsewhere."""
    if name != "auto":
        return name
    if computes_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"
