"""Network slimming: push the scales of BatchNorm to zero, so that channels can be cut off.

Before each step every scale moves ``lr * strength`` towards 0: the subgradient of
``strength * sum |gamma|``, taken outside the optimizer so that Adam does not rescale it.

Source: Liu et al. 2017, arXiv:1708.06519, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

LEAST_REACH = 0.1  # of scales that start near 1


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scale ``gamma`` of each BatchNorm layer that has one, by the layer's name."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }


def add_slimming(optimizer: Optimizer, model: nn.Module, strength: float = 5e-4) -> None:
    """From now on each step of ``optimizer`` also slims ``model``.

    Raises:
        ValueError: a strength that is not positive, or a network without BatchNorm scales.
    """
    if not 0.0 < strength < float("inf"):
        raise ValueError(f"--slim {strength}, expected a number above 0")
    gammas = [gamma for gamma in scales(model).values() if gamma.requires_grad]
    if not gammas:
        raise ValueError("--sparsity: the network has no BatchNorm scale, expected one that has")
    chosen = {id(gamma) for gamma in gammas}

    @torch.no_grad()
    def slim(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if id(parameter) in chosen and parameter.grad is not None:
                    parameter.sub_(parameter.sign(), alpha=group["lr"] * strength)

    base = getattr(optimizer, "_base_optimizer", optimizer)  # inside timm's Lookahead
    base.register_step_pre_hook(slim)


def slimming_reach(rates: Sequence[float], steps: int, strength: float) -> float:
    """How far slimming moves a scale at most in a training: ``strength`` times the sum of rates.

    Args:
        rates: learning rate of each epoch.
        steps: of an epoch.
        strength: of :func:`add_slimming`.
    """
    return strength * steps * sum(rates)


def slimming_note(reach: float, strength: float) -> str | None:
    """What to tell the user of a reach that cuts nothing off; None for one that may.

    Scales start near 1. One that hardly moves tells nothing of its channel, and pruning by it
    would cut by the first random values.
    """
    if reach >= LEAST_REACH:
        return None
    return (
        f"note: --sparsity moves a scale by at most {reach:.1g} in all this training, expected "
        f"{LEAST_REACH} or more of scales near 1: pruning would cut by chance. Take --slim "
        f"{strength * LEAST_REACH / reach:.1g} or more, or a larger --lr"
    )


def sparsity_facts(model: nn.Module, *, near: float = 1e-2) -> dict[str, float]:
    """Number of scales, share of them below ``near``, their median and mean (absolute values)."""
    values = torch.cat(
        [gamma.detach().abs().flatten().float().cpu() for gamma in scales(model).values()]
    )
    return {
        "gammas": float(len(values)),
        "near_zero": float((values < near).float().mean()),
        "median": float(values.median()),
        "mean": float(values.mean()),
    }
