"""Gate targets and their loss, against brute force in NumPy float64."""

import numpy as np
import pytest
import torch

from gfnet_dynn.train.exit_losses import (
    gate_loss,
    gate_targets,
    level_losses,
    normalised_costs,
    pos_weights,
    target_exits,
)

COSTS = normalised_costs([100.0, 180.0, 250.0, 400.0])


def batch(seed=0, n=40, k=5, exits=4):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(exits, n, k)) * 2
    labels = rng.integers(0, k, n)
    tensors = [torch.tensor(z, dtype=torch.float32) for z in logits]
    return logits, labels, tensors, torch.tensor(labels)


def level_loss_reference(logits, label, cost, tradeoff, objective):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    right = int(np.argmax(logits)) == label
    loss = {
        "ce": -np.log(p[label]),
        "zeroOne": -1.0 if right else 0.0,
        "prob": -p.max() if right else 0.0,
    }[objective]
    return loss + tradeoff * cost


@pytest.mark.parametrize("objective", ["ce", "zeroOne", "prob"])
@pytest.mark.parametrize("tradeoff", [0.0, 0.75])
def test_level_losses_match_the_definition(objective, tradeoff):
    logits, labels, tensors, targets = batch()
    got = level_losses(tensors, targets, costs=COSTS, tradeoff=tradeoff, objective=objective)
    want = [
        [
            level_loss_reference(logits[e, i], labels[i], COSTS[e], tradeoff, objective)
            for e in range(4)
        ]
        for i in range(40)
    ]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_targets_are_the_argmin_and_cumulative():
    _, _, tensors, labels = batch()
    losses = level_losses(tensors, labels, costs=COSTS, tradeoff=0.5)
    target = target_exits(losses)
    assert len(set(target.tolist())) > 2  # else the test shows little
    for row, chosen in zip(losses.tolist(), target.tolist(), strict=True):
        assert chosen == row.index(min(row))
    wanted = [[1.0 if t <= gate else 0.0 for gate in range(3)] for t in target.tolist()]
    assert gate_targets(target, 3).tolist() == wanted


def test_the_earliest_of_equal_exits_is_the_target():
    losses = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    assert target_exits(losses).tolist() == [1, 0, 2]
    assert gate_targets(torch.tensor([2]), 2).tolist() == [[0.0, 0.0]]  # the final head


def test_without_a_price_of_compute_the_loss_alone_decides():
    logits, labels, tensors, targets = batch()
    target = target_exits(level_losses(tensors, targets, costs=COSTS, tradeoff=0.0))
    shifted = logits - logits.max(axis=2, keepdims=True)
    ce = np.log(np.exp(shifted).sum(axis=2)) - shifted[:, np.arange(40), labels]
    assert target.tolist() == ce.argmin(axis=0).tolist()


def test_at_an_enormous_price_everything_leaves_at_once():
    _, _, tensors, labels = batch()
    target = target_exits(level_losses(tensors, labels, costs=COSTS, tradeoff=1e6))
    assert target.tolist() == [0] * 40


def test_mean_target_exit_falls_with_the_price():
    _, _, tensors, labels = batch(n=400)
    means = [
        target_exits(level_losses(tensors, labels, costs=COSTS, tradeoff=t)).float().mean().item()
        for t in (0.0, 0.5, 2.0, 8.0)
    ]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]


def test_costs_are_fractions_of_the_whole():
    np.testing.assert_array_equal(COSTS, [0.25, 0.45, 0.625, 1.0])


@pytest.mark.parametrize("costs", [[1.0], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, np.nan]])
def test_costs_must_rise(costs):
    with pytest.raises(ValueError, match="exit_costs"):
        normalised_costs(costs)


def test_positive_weights_by_hand():
    # 100 samples: 20, 50, 80 positives -> 80/20, 50/50, 20/80
    assert pos_weights([20, 50, 80], 100).tolist() == [4.0, 1.0, 0.25]
    # none and few are capped at 5, (nearly) all at 1/5
    np.testing.assert_allclose(pos_weights([0, 5, 99, 100], 100), [5, 5, 0.2, 0.2])


def test_weights_are_made_from_cumulative_counts():
    target = torch.tensor([0] * 10 + [1] * 10 + [2] * 60 + [3] * 20)
    counts = gate_targets(target, 3).sum(dim=0)
    assert counts.tolist() == [10, 20, 80]
    assert pos_weights(counts, 100).tolist() == [5.0, 4.0, 0.25]


def test_gate_loss_matches_the_definition():
    rng = np.random.default_rng(1)
    z, y = rng.normal(size=(30, 3)) * 3, rng.integers(0, 2, (30, 3)).astype(float)
    weights = np.array([4.0, 1.0, 0.25])
    g = 1 / (1 + np.exp(-z))
    want = -(weights * y * np.log(g) + (1 - y) * np.log(1 - g)).mean()
    got = gate_loss(torch.tensor(z), torch.tensor(y).float(), torch.tensor(weights))
    assert got.item() == pytest.approx(want, rel=1e-6)
    plain = -(y * np.log(g) + (1 - y) * np.log(1 - g)).mean()
    assert gate_loss(torch.tensor(z), torch.tensor(y).float()).item() == pytest.approx(plain)


def test_a_gate_whose_samples_are_all_positive_learns_to_open():
    """With a weight of 0 for them, as negatives over positives says, it never would."""
    gate_logits = torch.full((16, 2), -1.0, requires_grad=True)
    targets = torch.ones(16, 2)
    gate_loss(gate_logits, targets, pos_weights([16, 16], 16)).backward()
    assert (gate_logits.grad < 0).all()


def test_level_losses_carry_no_gradient():
    _, _, tensors, labels = batch()
    tensors = [z.requires_grad_() for z in tensors]
    assert not level_losses(tensors, labels, costs=COSTS, tradeoff=1.0).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "acc"}, "unknown gate objective 'acc'"),
        ({"tradeoff": -1.0}, "trade-off is -1.0"),
        ({"tradeoff": float("nan")}, "trade-off is nan"),
        ({"costs": [0.5, 1.0]}, "2 costs for 4 exits"),
    ],
)
def test_level_losses_refuse(change, message):
    _, _, tensors, labels = batch()
    with pytest.raises(ValueError, match=message):
        level_losses(tensors, labels, **{"costs": COSTS, "tradeoff": 0.5, **change})


@pytest.mark.parametrize(("counts", "n"), [([5], 4), ([-1], 4), ([1], 0)])
def test_positive_weights_refuse(counts, n):
    with pytest.raises(ValueError, match="positive counts"):
        pos_weights(counts, n)
