"""MixQuant: bits of each layer from the round-off error of its weights alone.

The rule as published takes for each layer the fewest bits whose round-off error is at most a
multiple of that with 8 bits. **It degenerates with min-max ranges by channel**: one bit less makes
the step twice as wide and the mean squared error four times as large *in every layer*, so the
ratios hardly differ between layers: mostly all get the same bits, else they are one bit apart,
however different the layers are. ``within_budget`` compares errors between layers instead, each
relative to the energy of its weights, and solves for the least total under a budget.

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

REFERENCE = 8


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


def published_rule(errors: Table, *, multiplier: float, reference: int = REFERENCE) -> dict:
    """The fewest bits with ``error(bits) <= multiplier * error(reference)``, layer by layer.

    Args:
        errors: of :func:`round_off_errors`, with ``reference`` among the bits.
        multiplier: at least 1; the paper's QMP.

    Returns:
        Bits by layer.

    Raises:
        ValueError: a multiplier below 1, or no error at the reference.
    """
    if not multiplier >= 1:
        raise ValueError(f"multiplier is {multiplier}, expected at least 1")
    chosen = {}
    for name, row in errors.items():
        if reference not in row:
            raise ValueError(f"layer {name!r} has no error at {reference} bits, expected one")
        allowed = multiplier * row[reference] * (1 + 1e-12)
        chosen[name] = min(bits for bits, error in row.items() if error <= allowed)
    return chosen


def published_within(errors: Table, budget: Budget, *, reference: int = REFERENCE) -> BitPlan:
    """The published rule with the smallest multiplier whose bits fit the budget.

    Between two neighbouring ratios of the errors the rule does not change, so only these are tried.
    Layers with one choice keep it.

    Args:
        errors: by layer and bits, the budget's choices and ``reference`` among them.

    Raises:
        ValueError: see :func:`published_rule`.
    """
    ratios = {1.0}
    for name, row in errors.items():
        if reference not in row:
            raise ValueError(f"layer {name!r} has no error at {reference} bits, expected one")
        ratios |= {max(1.0, row[b] / max(row[reference], 1e-300)) for b in budget.w_options[name]}
    a = budget.largest().a
    for multiplier in sorted(ratios):
        rule = published_rule(errors, multiplier=multiplier, reference=reference)
        w = {n: _nearest_choice(rule[n], budget.w_options[n]) for n in budget.names}
        if budget.fits(BitPlan(w, a)):
            return budget.check(BitPlan(w, a))
    return budget.check(budget.bring_within(BitPlan(budget.cheapest().w, a)))


def _nearest_choice(bits: int, options: Sequence[int]) -> int:
    """The fewest of the choices that are not below ``bits``, or the most there is."""
    return min((one for one in options if one >= bits), default=options[-1])


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
