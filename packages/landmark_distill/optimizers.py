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
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    decay_on: str = "all",
    body: nn.Module | None = None,
    body_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn; frozen ones are left out.

    Args:
        named: names and parameters.
        weight_decay: of those that get one.
        decay_on: ``all`` as the original, or ``matrices`` (see :func:`decays`).
        body: a trained part that learns at ``body_rate`` of the rate.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``rate``, their share of the learning rate.

    Raises:
        ValueError: unknown ``decay_on``, or nothing that learns.
    """
    if decay_on not in DECAY:
        raise ValueError(f"weight decay on {decay_on!r}, expected one of {', '.join(DECAY)}")
    learning = [(name, p) for name, p in named if p.requires_grad]
    if not learning:
        raise ValueError("no weight learns: expected at least one that is not frozen")
    trained = {id(p) for p in body.parameters()} if body is not None else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learning:
        decay = weight_decay if decay_on == "all" or decays(name, parameter) else 0.0
        rate = body_rate if id(parameter) in trained else 1.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate": rate}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0])[::-1]
    ]


def build_optimizer(
    kind: str,
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    decay_on: str = "all",
    body: nn.Module | None = None,
    body_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """``SGD``, ``Adam`` (decay added to the gradient) or ``AdamW`` (decay apart from it).

    Args:
        momentum: of SGD; the original had none.
        body, body_rate: see :func:`parameter_groups`.

    Raises:
        ValueError: an unknown kind, or momentum where there is none.
    """
    groups = parameter_groups(
        named, weight_decay=weight_decay, decay_on=decay_on, body=body, body_rate=body_rate
    )
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer {kind!r}, expected one of {', '.join(OPTIMIZERS)}")
    if momentum:
        raise ValueError(f"momentum {momentum:g} with {kind}: expected SGD, {kind} has its own")
    chosen = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
    return chosen(groups, lr=lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
