"""SGD, Adam or AdamW over the weights that learn, with or without decay on norms and biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from landmark_distill.config import DECAY, OPTIMIZERS
from shared_core.for_torch.pretrained import parameter_groups as depth_groups


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
    rates: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn; frozen ones are left out.

    Args:
        named: names and parameters.
        weight_decay: of those that get one.
        decay_on: ``all`` as the original, or ``matrices`` (see :func:`decays`).
        rates: shares of the rate by ``id`` of a parameter, see :func:`body_rates`; others have 1.

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
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learning:
        decay = weight_decay if decay_on == "all" or decays(name, parameter) else 0.0
        rate = (rates or {}).get(id(parameter), 1.0)
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate": rate}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0])[::-1]
    ]


def body_rates(body: nn.Module, *, rate: float, layer_decay: float) -> dict[int, float]:
    """Shares of the learning rate of a trained body's weights by their ``id``.

    Its last layers have ``rate``, those below ``layer_decay`` of the ones above; depths are those
    of :func:`shared_core.for_torch.pretrained.parameter_groups`.
    """
    whole = nn.Module()  # the body's parts under their own names, and a head, which it lost
    for name, child in body.named_children():
        whole.add_module(name, child)
    for name, parameter in body.named_parameters(recurse=False):
        whole.register_parameter(name, parameter)
    whole.add_module("features_head", nn.Linear(1, 1))
    groups = depth_groups(
        whole, num_classes=1, body_lr=rate, head_lr=1.0, weight_decay=0.0, layer_decay=layer_decay
    )
    return {id(p): group["lr"] for group in groups for p in group["params"]}


def build_optimizer(
    kind: str,
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    decay_on: str = "all",
    rates: Mapping[int, float] | None = None,
) -> torch.optim.Optimizer:
    """``SGD``, ``Adam`` (decay added to the gradient) or ``AdamW`` (decay apart from it).

    Args:
        momentum: of SGD; the original had none.
        rates: see :func:`parameter_groups`.

    Raises:
        ValueError: an unknown kind, or momentum where there is none.
    """
    groups = parameter_groups(named, weight_decay=weight_decay, decay_on=decay_on, rates=rates)
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
