"""The choice of bits against every choice there is, and damages that grow as bits fall."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn

from mpkd.quant.layers import quantize_net
from mpkd.quant.search.sensitivity import choose_bits, sensitivities


def size_cost(weights, bits):
    return {name: {b: float(count * b) for b in bits} for name, count in weights.items()}


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    names, bits = ["a", "b", "c", "d"], [2, 3, 4, 8]
    damage = {n: {b: float(rng.exponential() * 4.0**-b) for b in bits} for n in names}
    weights = {n: int(rng.integers(10, 10_000)) for n in names}
    cost = size_cost(weights, bits)
    budget = float(rng.uniform(2.1, 7.9)) * sum(weights.values())
    allowed = [
        choice for choice in itertools.product(bits, repeat=4)
        if sum(cost[n][b] for n, b in zip(names, choice, strict=True)) <= budget
    ]  # fmt: skip

    def total(choice) -> float:
        return sum(damage[n][b] for n, b in zip(names, choice, strict=True))

    chosen = choose_bits(damage, cost, budget)
    assert sum(cost[n][b] for n, b in chosen.items()) <= budget
    assert total([chosen[n] for n in names]) == pytest.approx(min(map(total, allowed)), rel=1e-6)


def test_limits_of_the_budget():
    damage = {"a": {2: 1.0, 8: 0.0}, "b": {2: 1.0, 8: 0.0}}
    cost = size_cost({"a": 10, "b": 10}, [2, 8])
    assert choose_bits(damage, cost, 40) == {"a": 2, "b": 2}
    assert choose_bits(damage, cost, 160) == {"a": 8, "b": 8}
    assert sorted(choose_bits(damage, cost, 100).values()) == [2, 8]
    with pytest.raises(ValueError, match="cheapest choice costs 40, expected at most 39"):
        choose_bits(damage, cost, 39)
    with pytest.raises(ValueError, match="other layers"):
        choose_bits(damage, {"a": cost["a"]}, 100)


def test_damage_is_the_divergence_of_the_answers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).eval()
    with torch.no_grad():
        net[4].weight.mul_(10)
    images = torch.rand(16, 3, 8, 8)
    table = sensitivities(net, images, [2, 4, 8])
    assert set(table) == {"0", "4"}
    for row in table.values():
        assert row[2] > row[4] > row[8] >= 0
    with torch.no_grad():
        full = torch.softmax(net(images).double(), 1).numpy()
        trial = torch.softmax(quantize_net(copy.deepcopy(net), {"4": 2})(images).double(), 1)
    assert table["4"][2] == pytest.approx(entropy(full, trial.numpy(), axis=1).mean(), rel=1e-4)
    assert isinstance(net[4], nn.Linear)  # the network itself stays


def test_bits_follow_planted_sensitivity():
    """One layer's answer decides everything, the other's nothing: the measured table says so."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    weights = {name: net.get_submodule(name).weight.numel() for name in ("2", "6")}
    images = torch.rand(32, 3, 10, 10)
    chosen = {}
    for important in ("2", "6"):
        planted = copy.deepcopy(net)
        with torch.no_grad():
            if important == "2":  # the head's weights are two levels: 2 bits lose nothing
                planted[6].weight.copy_(planted[6].weight.sign())
            else:
                planted[2].weight.copy_(0.1 * planted[2].weight.sign())
                planted[6].weight.mul_(4)
        damage = sensitivities(planted, images, [2, 4, 8], names=("2", "6"))
        cost = size_cost(weights, [2, 4, 8])
        for name in damage:  # one unit each, so that the cost does not decide
            cost[name] = {bits: float(bits) for bits in cost[name]}
        chosen[important] = choose_bits(damage, cost, 10)
    assert chosen["2"]["2"] > chosen["2"]["6"] and chosen["6"]["6"] > chosen["6"]["2"]
