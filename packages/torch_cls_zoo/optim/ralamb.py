"""Ralamb: the rectified Adam step, scaled layer by layer to the size of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LARGEST_NORM = 10.0  # weights count as at most this long
RECTIFIED_FROM = 5.0  # below this length of the average its variance is not known


class Ralamb(Optimizer):
    """RAdam's step ``r`` times ``min(|w|, 10) / |r|``; the ratio is 1 where either norm is 0.

    While too few steps were taken for a variance (``rho <= 5``), ``r`` is the bias-corrected
    momentum alone. No maintained library has it; its parts are RAdam (torch) and LAMB (timm).

    Args:
        params: parameters or groups.
        lr: learning rate, above 0.
        betas: decay of the two moving averages, each in [0, 1).
        eps: added to the root of the second moment.

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2; You et al. 2020, arXiv:1904.00962,
    algorithm 2 with ``phi(z) = min(z, 10)``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not lr > 0 or not eps > 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Ralamb with lr {lr}, betas {betas}, eps {eps}: a value out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` is called first, with gradients, when there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = self._direction(parameter, group)
                weight_norm = parameter.norm().clamp(max=LARGEST_NORM)
                step_norm = direction.norm()
                ratio = torch.where(
                    (weight_norm > 0) & (step_norm > 0), weight_norm / step_norm, 1.0
                )
                parameter.sub_(direction * (group["lr"] * ratio))
        return loss

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """RAdam's step without the learning rate."""
        state, gradient = self.state[parameter], parameter.grad
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        t = state["step"]
        state["mean"].lerp_(gradient, 1.0 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        mean = state["mean"] / (1.0 - beta1**t)
        longest = 2.0 / (1.0 - beta2) - 1.0
        rho = longest - 2.0 * t * beta2**t / (1.0 - beta2**t)
        if rho <= RECTIFIED_FROM:
            return mean
        rectify = math.sqrt(
            (rho - 4.0) * (rho - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * rho)
        )
        root = (state["square"] / (1.0 - beta2**t)).sqrt_().add_(group["eps"])
        return mean.div_(root).mul_(rectify)
