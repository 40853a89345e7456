"""SGD, Adam or AdamW over the weights that learn, with or without decay on norms and biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from landmark_distill.config import DECAY, OPTIMIZERS


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether ``matrices`` puts weight decay on a parameter: on matrices and kernels only.

    Biases, norms and the tables of relative positions are left alone.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, for the decay; Touvron et al. 2021,
    arXiv:2012.12877, and Liu et al. 2021, arXiv:2103.14030, for what it leaves out.
    """
    return parameter.ndim > 1 and "relative_position_bias" not in name


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, decay_on: str = "all"
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn; frozen ones are left out.

    Args:
        named: names and parameters.
        weight_decay: of those that get one.
        decay_on: ``all`` as the original, or ``matrices`` (see :func:`decays`).

    Raises:
        ValueError: unknown ``decay_on``, or nothing that learns.
    """
    if decay_on not in DECAY:
        raise ValueError(f"weight decay on {decay_on!r}, expected one of {', '.join(DECAY)}")
    learning = [(name, p) for name, p in named if p.requires_grad]
    if not learning:
        raise ValueError("no weight learns: expected at least one that is not frozen")
    if decay_on == "all":
        return [{"params": [p for _, p in learning], "weight_decay": weight_decay}]
    with_decay = [p for name, p in learning if decays(name, p)]
    without = [p for name, p in learning if not decays(name, p)]
    groups = [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    kind: str,
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    decay_on: str = "all",
) -> torch.optim.Optimizer:
    """``SGD``, ``Adam`` (decay added to the gradient) or ``AdamW`` (decay apart from it).

    Args:
        momentum: of SGD; the original had none.

    Raises:
        ValueError: an unknown kind, or momentum where there is none.
    """
    groups = parameter_groups(named, weight_decay=weight_decay, decay_on=decay_on)
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer {kind!r}, expected one of {', '.join(OPTIMIZERS)}")
    if momentum:
        raise ValueError(f"momentum {momentum:g} with {kind}: expected SGD, {kind} has its own")
    chosen = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
    return chosen(groups, lr=lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
