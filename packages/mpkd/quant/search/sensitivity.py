"""How much each layer suffers from few bits, and the best choice under a budget by an exact solver.

The damage of a choice is taken as the sum of the layers' damages, each measured alone. The sum is
an approximation: errors of several layers can cancel or grow, so the choice is not always better
than the same bits everywhere. Compare both on the calibration images before you ship one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkd.quant.layers import quantizable, quantize_net

Table = dict[str, dict[int, float]]


@torch.no_grad()
def sensitivities(
    net: nn.Module,
    images: Tensor,
    candidates: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    symmetric: bool = True,
) -> Table:
    """KL divergence of the network's answers when one layer alone has few bits.

    Args:
        net: in evaluation mode, not quantized; it is not changed.
        images: calibration images ``(N, 3, H, W)``.
        candidates: bits to try.
        names: layers to try; None = every convolution and linear layer.

    Returns:
        Mean over the images of ``KL(full || quantized)`` in nats, by layer and bits.
    """
    wanted = F.log_softmax(net(images).float(), dim=1)
    table: Table = {}
    for name in names or quantizable(net):
        table[name] = {}
        for bits in candidates:
            trial = quantize_net(copy.deepcopy(net), {name: bits}, symmetric=symmetric)
            found = F.log_softmax(trial(images).float(), dim=1)
            kl = (wanted.exp() * (wanted - found)).sum(dim=1).mean()
            table[name][bits] = max(0.0, float(kl))
    return table


def choose_bits(
    damage: Mapping[str, Mapping[int, float]],
    cost: Mapping[str, Mapping[int, float]],
    budget: float,
) -> dict[str, int]:
    """The bits of the least total damage whose total cost is within the budget.

    An integer programme: one choice a layer, ``min sum damage``, ``sum cost <= budget``, solved
    exactly by ``scipy.optimize.milp``.

    Args:
        damage, cost: by layer and bits, the same layers and bits in both; any units.
        budget: largest total cost.

    Returns:
        Bits by layer.

    Raises:
        ValueError: even the cheapest choice is above the budget; layers or bits differ.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(name, bits) for name in damage for bits in damage[name]]
    if {name: set(row) for name, row in damage.items()} != {
        name: set(row) for name, row in cost.items()
    }:
        raise ValueError("damage and cost are about other layers or bits, expected the same")
    cheapest = sum(min(row.values()) for row in cost.values())
    if cheapest > budget * (1 + 1e-12):
        raise ValueError(f"the cheapest choice costs {cheapest:g}, expected at most {budget:g}")
    harm = np.array([damage[name][bits] for name, bits in options], dtype=np.float64)
    price = np.array([cost[name][bits] for name, bits in options], dtype=np.float64)
    unit = max(float(np.abs(price).max()), 1e-300)  # the solver's tolerance is absolute
    one = np.array([[float(name == layer) for name, _ in options] for layer in damage])
    solved = milp(
        harm / max(float(np.abs(harm).max()), 1e-300),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(price[None] / unit, -np.inf, budget / unit),
        ],
    )
    if not solved.success:
        raise ValueError(f"no choice of bits found: {solved.message}")
    chosen = {
        name: bits for (name, bits), taken in zip(options, solved.x, strict=True) if taken > 0.5
    }
    spent = sum(cost[name][bits] for name, bits in chosen.items())
    if spent > budget * (1 + 1e-9):
        raise ValueError(f"the solver's choice costs {spent:g}, expected at most {budget:g}")
    return chosen
