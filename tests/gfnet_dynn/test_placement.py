"""Placement of exits against a search over everything, sample by sample."""

from itertools import combinations

import numpy as np
import pytest

from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.decide.placement import exit_overheads, pruned_costs, search
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn

OVERHEADS = np.array([10.0, 10.0, 10.0, 10.0])
COSTS = np.array([60.0, 120.0, 180.0, 240.0, 300.0])


def outputs_of(seed=0, n=40, k=3, gates=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(gates + 1, n, k))
    logits[:, np.arange(n), labels] += np.array([0.2, 1.5, 0.6, 1.6, 2.0])[: gates + 1, None]
    gate_logits = rng.normal(size=(n, gates)).astype(np.float32)
    return ExitLogits(
        logits.astype(np.float32), gate_logits, labels, COSTS, tuple(range(1, gates + 1))
    )


def everything(outputs, policy, budget, max_exits):
    """Best (accuracy, -cost, -exits) over subsets and thresholds, by loops over samples."""
    best = None
    for size in range(max_exits + 1):
        for subset in combinations(range(4), size):
            places = [*subset, 4]
            costs = [COSTS[e] - sum(OVERHEADS[j] for j in range(e) if j not in subset)
                     for e in places]  # fmt: skip
            kept = outputs.keep(subset, costs=np.array(costs))
            scores = kept.scores(policy)
            for t in [*np.unique(scores.astype(float)), 99.0]:
                cost, right = 0.0, 0
                for i in range(len(outputs.labels)):
                    left = next((e for e in range(size) if scores[i, e] >= t), size)
                    cost += costs[left]
                    right += int(outputs.correct[places[left], i])
                n = len(outputs.labels)
                if cost / n <= budget + 1e-9:
                    rank = (right / n, -round(cost / n, 6), -size)
                    if best is None or rank > best[0]:
                        best = (rank, subset)
    return best


@pytest.mark.parametrize("kind", ["max_prob", "jei", "patience"])
@pytest.mark.parametrize(("budget", "max_exits"), [(120.0, 2), (200.0, 4), (260.0, 1)])
def test_search_equals_the_loops(kind, budget, max_exits):
    outputs, policy = outputs_of(), ExitPolicy(kind)
    (accuracy, cost, size), subset = everything(outputs, policy, budget, max_exits)
    found = search(outputs, policy, overheads=OVERHEADS, mean_cost=budget, max_exits=max_exits)
    assert found.exhaustive
    assert found.calibration["accuracy"] == pytest.approx(accuracy)
    assert found.calibration["cost"] == pytest.approx(-cost)
    assert found.calibration["cost"] <= budget + 1e-9
    assert len(found.exits) == -size and found.exits == subset
    assert found.blocks == tuple(i + 1 for i in subset)


def test_a_large_budget_keeps_only_what_helps():
    outputs = outputs_of(n=200)
    found = search(outputs, ExitPolicy("max_prob"), overheads=OVERHEADS, mean_cost=1e9)
    assert found.calibration["accuracy"] >= outputs.correct[-1].mean()
    none = search(outputs, ExitPolicy("max_prob"), overheads=OVERHEADS, mean_cost=1e9, max_exits=0)
    assert none.exits == () and none.calibration["cost"] == pytest.approx(300 - 40)
    assert none.calibration["accuracy"] == pytest.approx(outputs.correct[-1].mean())


def test_few_exits_beat_all_exits_when_some_are_poor():
    """The exits at 0 and 2 are poor here; all exits share the threshold that lets them spoil it."""
    outputs, policy = outputs_of(n=300), ExitPolicy("gate")
    few = search(outputs, policy, overheads=OVERHEADS, mean_cost=180, max_exits=4)
    assert 0 not in few.exits and 2 not in few.exits


@pytest.mark.parametrize("seed", range(2))
def test_greedy_search_meets_the_budget_and_the_limit(seed):
    outputs, policy = outputs_of(seed, n=100), ExitPolicy("max_prob")
    options = {"overheads": OVERHEADS, "mean_cost": 170.0, "max_exits": 2}
    best = search(outputs, policy, **options)
    greedy = search(outputs, policy, **options, limit=3)
    assert not greedy.exhaustive and len(greedy.exits) <= 2
    assert greedy.calibration["cost"] <= 170 + 1e-9
    assert best.calibration["accuracy"] >= greedy.calibration["accuracy"]
    assert greedy.calibration["accuracy"] >= best.calibration["accuracy"] - 0.1


def test_the_found_policy_is_what_the_summary_says():
    outputs = outputs_of(n=100)
    temperatures = (1.1, 1.2, 1.3, 1.4, 1.5)
    policy = ExitPolicy("max_prob", temperatures=temperatures)
    found = search(outputs, policy, overheads=OVERHEADS, mean_cost=170.0, max_exits=2)
    assert found.policy.temperatures == tuple(temperatures[i] for i in (*found.exits, 4))
    kept = outputs.keep(found.exits, costs=found.costs)
    exit_index = kept.select(found.policy)
    right = kept.correct[exit_index, np.arange(100)]
    assert right.mean() == pytest.approx(found.calibration["accuracy"])


def test_costs_of_a_pruned_network_by_hand():
    assert pruned_costs(COSTS, OVERHEADS, [0, 1, 2, 3]).tolist() == COSTS.tolist()
    assert pruned_costs(COSTS, OVERHEADS, [1, 3]).tolist() == [110.0, 220.0, 280.0]
    assert pruned_costs(COSTS, OVERHEADS, []).tolist() == [260.0]


@pytest.mark.parametrize("gate", ["unc", "identity"])
def test_costs_are_those_of_a_network_with_these_exits_alone(gate):
    backbone = GFNet(img_size=16, patch_size=4, num_classes=4, embed_dim=8, depth=5)
    model = GFNetDynn(backbone, [0, 1, 2, 3], gate=gate)
    for exits in ([], [2], [0, 3], [0, 1, 2, 3]):
        costs = pruned_costs(model.exit_costs(), exit_overheads(model), exits)
        np.testing.assert_allclose(GFNetDynn(backbone, exits, gate=gate).exit_costs(), costs)


def test_refusals():
    outputs, policy = outputs_of(), ExitPolicy("max_prob")
    with pytest.raises(ValueError, match="no placement of exits has a mean cost of 59 MACs"):
        search(outputs, policy, overheads=OVERHEADS, mean_cost=59)
    with pytest.raises(ValueError, match="3 overheads for 4 exits"):
        search(outputs, policy, overheads=OVERHEADS[:3], mean_cost=100)
    with pytest.raises(ValueError, match="max_exits is -1"):
        search(outputs, policy, overheads=OVERHEADS, mean_cost=100, max_exits=-1)
