"""MixQuant: round-off errors by NumPy, and the best choice under a budget by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.quant.budget import BitPlan, layer_options, size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.search.mixquant import round_off_errors, within_budget

BITS = (2, 3, 4, 5, 6, 7, 8)


def net() -> nn.Module:
    """Three layers whose weights have very different shapes of distribution and scales."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6),
    ).eval()  # fmt: skip
    with torch.no_grad():
        made[2].weight.copy_(torch.randn_like(made[2].weight) ** 3)  # long tails
        made[5].weight.mul_(100)
    return made


def budget(mean: float, bits=BITS):
    facts = layer_facts(net(), 8)
    w = layer_options(facts, bits, first_last=None)
    return size_budget(facts, mean, w_options=w, a_options=dict.fromkeys(w, (32,)))


def test_errors_are_numpys():
    errors = round_off_errors(net(), [3, 32])
    weight = net()[2].weight.detach().numpy().astype(np.float64).reshape(8, -1)
    low, high = np.minimum(weight.min(1), 0), np.maximum(weight.max(1), 0)
    step = ((high - low) / 7)[:, None]
    zero = np.clip(np.round(-low / step[:, 0]), 0, 7)[:, None]
    rounded = (np.clip(np.round(weight / step) + zero, 0, 7) - zero) * step
    assert errors["2"][3] == pytest.approx(((rounded - weight) ** 2).mean(), rel=1e-4)
    assert errors["2"][32] == 0


def test_why_errors_are_not_compared_with_those_of_eight_bits():
    """However different the layers are, one bit less is a factor of about four in each."""
    errors = round_off_errors(net(), BITS)
    ratios = np.array([[row[b - 1] / row[b] for b in BITS[2:]] for row in errors.values()])
    assert ratios.min() > 3 and ratios.max() < 5.6
    scale_of_errors = [row[4] for row in errors.values()]
    assert max(scale_of_errors) > 100 * min(scale_of_errors)  # and yet the layers do differ


@pytest.mark.parametrize("mean", [2.3, 3.0, 5.5])
def test_the_budgeted_form_is_the_best_of_all(mean):
    bits = (2, 4, 6, 8)
    limit, errors = budget(mean, bits), round_off_errors(net(), bits)
    found = within_budget(net(), errors, limit)
    energy = {n: float((net().get_submodule(n).weight.detach() ** 2).mean()) for n in errors}

    def damage(w):
        return sum(errors[n][b] / energy[n] for n, b in w.items())

    every = [dict(zip(errors, w, strict=True)) for w in itertools.product(bits, repeat=3)]
    fitting = [w for w in every if limit.fits(BitPlan(w, found.a))]
    assert limit.fits(found)
    assert damage(found.w) == pytest.approx(min(map(damage, fitting)), rel=1e-6)
    if mean == 3.0:
        assert len(set(found.w.values())) > 1
