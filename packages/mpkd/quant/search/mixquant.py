"""MixQuant: bits of each layer from the round-off error of its weights alone.

Published is a rule: for each layer the fewest bits whose round-off error is at most a multiple of
that with 8 bits. With min-max ranges by channel one bit less makes the step twice as wide and the
mean squared error four times as large *in every layer*, so that rule gives all layers the same
bits, or one apart, however different they are. Here errors are compared between layers instead,
each relative to the energy of its weights, and the least total under a budget is solved for.

Source: Kloberdanz and Le 2023, arXiv:2309.17341 (the rule as far as it is known to us; its code is
    not public).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mpkd.quant.budget import BitPlan, Budget
from mpkd.quant.layers import FLOAT, quantizable
from mpkd.quant.quantizers import WeightQuantizer
from mpkd.quant.search.sensitivity import Table, choose_bits


@torch.no_grad()
def round_off_errors(
    net: nn.Module,
    candidates: Sequence[int],
    *,
    symmetric: bool = False,
    method: str = "minmax",
) -> Table:
    """Mean squared difference of each layer's weights and their quantized form.

    Args:
        net: not quantized, batch norms folded where they will be.
        candidates: bits; 32 has the error 0.
        symmetric, method: of the grids, by channel; the paper's are asymmetric and min-max.

    Returns:
        By layer and bits, in squared units of the weights.
    """
    table: Table = {}
    for name in quantizable(net):
        weight = net.get_submodule(name).weight.detach()
        table[name] = {}
        for bits in candidates:
            if bits == FLOAT:
                table[name][bits] = 0.0
                continue
            quantizer = WeightQuantizer(weight, bits=bits, symmetric=symmetric, method=method)
            table[name][bits] = float((quantizer(weight) - weight).double().square().mean())
    return table


def within_budget(net: nn.Module, errors: Table, budget: Budget) -> BitPlan:
    """The bits of the least total relative round-off error under the budget.

    The damage of a layer is its error over the mean square of its weights, the share of the signal
    that rounding takes away.

    Args:
        net: whose weights the errors are of.
        errors: of :func:`round_off_errors`, for all choices of the budget.
    """
    a = budget.largest().a
    damage, cost = {}, {}
    for name, options in budget.w_options.items():
        energy = float(net.get_submodule(name).weight.detach().double().square().mean())
        damage[name] = {b: errors[name][b] / max(energy, 1e-300) for b in options}
        cost[name] = {b: budget.table[name][b, a[name]] for b in options}
    return budget.check(BitPlan(choose_bits(damage, cost, budget.limit), a))
