"""Budgets: costs by hand, a wall that holds, uniform bits, latencies only where they exist."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.deploy.layer_latency import check_measurable, latency_table, single_layer_graph
from mpkd.quant.budget import (
    BitPlan,
    Budget,
    bops_budget,
    latency_budget,
    layer_options,
    size_budget,
)
from mpkd.quant.cost import LayerFacts, layer_facts, plain_layer
from shared_core.deploy.session import open_session

FACTS = [LayerFacts("a", 10, 100), LayerFacts("b", 50, 400), LayerFacts("c", 20, 20)]
NAMES = [one.name for one in FACTS]
BITS = (2, 3, 4, 8)


def options(*, first_last=None, a=(8,)):
    return {
        "w_options": layer_options(FACTS, BITS, first_last=first_last),
        "a_options": dict.fromkeys(NAMES, a),
    }


def test_costs_and_limits_by_hand():
    size = size_budget(FACTS, 3.0, **options())
    plan = BitPlan({"a": 8, "b": 2, "c": 4}, dict.fromkeys(NAMES, 8))
    assert size.cost(plan) == 80 + 100 + 80 and size.limit == 240
    assert size.fits(BitPlan(dict.fromkeys(NAMES, 3), plan.a)) and not size.fits(plan)
    bops = bops_budget(FACTS, 0.5, **options(a=(4, 8)))
    assert bops.limit == 0.5 * 520 * 64
    mixed = BitPlan(plan.w, {"a": 4, "b": 8, "c": 8})
    assert bops.cost(mixed) == 100 * 8 * 4 + 400 * 2 * 8 + 20 * 4 * 8
    assert bops_budget(FACTS, 1.0, **options(a=(32,))).limit == 520 * 8 * 32
    times = {name: {2: 1.0, 3: 1.0, 4: 1.5, 8: 2.0} for name in NAMES}
    assert latency_budget(times, 0.75, **options()).limit == 4.5


@pytest.mark.parametrize("kind", ["size", "bops", "latency"])
def test_the_wall_holds_for_any_plan(kind):
    rng = np.random.default_rng(0)
    made = {
        "size": lambda: size_budget(FACTS, 2.6, **options(first_last=None)),
        "bops": lambda: bops_budget(FACTS, 0.15, **options(a=BITS)),
        # Not monotone in the bits: a small layer may be slower with fewer.
        "latency": lambda: latency_budget(
            {n: {b: float(rng.uniform(1, 3)) for b in BITS} for n in NAMES}, 0.9, **options()
        ),
    }
    for trial in range(40):
        try:
            budget = made[kind]()
        except ValueError:
            assert kind == "latency"  # its random times may leave nothing that fits
            continue
        plan = BitPlan(
            {n: int(rng.choice(budget.w_options[n])) for n in NAMES},
            {n: int(rng.choice(budget.a_options[n])) for n in NAMES},
        )
        kept = budget.check(budget.bring_within(plan))
        assert budget.cost(kept) <= budget.limit * (1 + 1e-9), trial
        if budget.fits(plan):
            assert kept == plan
        if kind != "latency":
            assert all(kept.w[n] <= plan.w[n] and kept.a[n] <= plan.a[n] for n in NAMES)


def test_the_wall_takes_from_the_last_layers_first():
    budget = size_budget(FACTS, 7.5, **options())  # 600 of 640 bits: 80 fewer from c is enough
    assert budget.bring_within(budget.largest()).w == {"a": 8, "b": 8, "c": 4}
    budget = size_budget(FACTS, 5.0, **options())
    assert budget.bring_within(budget.largest()).w == {"a": 8, "b": 4, "c": 4}


def test_uniform_bits_are_the_most_that_fit():
    budget = size_budget(FACTS, 4.3, **options())
    assert budget.best_uniform() == (4, budget.uniform(4))
    fixed = size_budget(FACTS, 4.3, **options(first_last=8))
    bits, plan = fixed.best_uniform()
    fitting = [b for b in BITS if 8 * 30 + 50 * b <= 4.3 * 80]
    assert bits == max(fitting) == 2 and plan.w == {"a": 8, "b": 2, "c": 8}


def test_limits_and_errors_of_a_budget():
    with pytest.raises(ValueError, match="the cheapest choice of bits costs 160"):
        size_budget(FACTS, 1.9, **options())
    with pytest.raises(ValueError, match=r"expected \(0, 1\]"):
        bops_budget(FACTS, 1.5, **options())
    with pytest.raises(ValueError, match="expected one of size, bops"):
        Budget("time", {}, 1, w_options={}, a_options={})
    with pytest.raises(ValueError, match="has no cost at 2 bits"):
        Budget("size", {"a": {}}, 1, w_options={"a": [2]}, a_options={"a": [8]})
    with pytest.raises(ValueError, match="candidate of 1 bits"):
        layer_options(FACTS, [1, 2])
    budget = size_budget(FACTS, 3.0, **options())
    with pytest.raises(ValueError, match="expected at most 240"):
        budget.check(budget.largest())
    with pytest.raises(ValueError, match="has 5 bits a weight"):
        budget.check(BitPlan(dict.fromkeys(NAMES, 5), dict.fromkeys(NAMES, 8)))
    every = itertools.product(BITS, repeat=3)
    costs = [budget.cost(BitPlan(dict(zip(NAMES, w, strict=True)), budget.largest().a))
             for w in every]  # fmt: skip
    assert budget.cost(budget.cheapest()) == min(costs)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


def test_latencies_are_measured_where_there_are_kernels():
    table = latency_table(small_net(), 8, repeats=3)
    assert list(table) == ["0", "2", "5"]
    assert all(set(row) == {8, 32} and min(row.values()) > 0 for row in table.values())
    with pytest.raises(ValueError, match="no kernels for 3, 4 bits, expected candidates"):
        latency_table(small_net(), 8, [3, 4, 8])
    with pytest.raises(ValueError, match="expected cpu: a GPU's are those of TensorRT"):
        check_measurable([8], "cuda")


def test_the_timed_graph_is_the_layer():
    torch.manual_seed(0)
    net = small_net()
    seen = {}
    for shape in layer_facts(net, 8):
        layer = plain_layer(net, shape.name)
        images = torch.randn(2, *shape.inputs)
        graph = single_layer_graph(shape, layer, 32, batch_size=2)
        session = open_session(graph.SerializeToString())
        found = session.run(None, {"x": images.numpy()})[0]
        wanted = layer(images) - layer.bias.reshape(-1, *[1] * (images.dim() - 2))
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)
        seen[shape.name] = shape.outputs
    assert seen == {"0": (6, 4, 4), "2": (6, 2, 2), "5": (4,)}
