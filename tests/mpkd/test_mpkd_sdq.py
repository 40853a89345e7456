"""SDQ: gates with the right chances and gradients, betas in [0, 1], bits that follow the task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.quant.budget import layer_options, size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.fake_quant import Grid, best_scale
from mpkd.quant.search.sdq import START, THRESHOLD, Sdq, TwoWayLayer, gumbel_gate

BITS = (2, 3, 4, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def made(mean: float = 3.0, *, of: nn.Module | None = None, bits=BITS, seed: int = 0) -> Sdq:
    of = net() if of is None else of
    facts = layer_facts(of, 8)
    w = layer_options(facts, bits, first_last=None)
    budget = size_budget(facts, mean, w_options=w, a_options=dict.fromkeys(w, (32,)))
    return Sdq(of, budget, seed=seed)


def batches(count: int, size: int = 8):
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        images = torch.randn(size, 3, 8, 8, generator=generator)
        yield images, torch.randint(4, (size,), generator=generator)


def learn(search: Sdq, steps: int, *, of=(0, 999), truth=None, rate=1e-3, size=8) -> Sdq:
    """A loop of its own, as plain as can be; ``of`` are the steps that are done."""
    optimizer = torch.optim.SGD(search.net.parameters(), lr=rate)
    for step, (images, labels) in enumerate(batches(steps, size)):
        if not of[0] <= step < of[1]:
            continue
        search.before_step(step, steps)
        wanted = labels if truth is None else truth(images)
        nn.functional.cross_entropy(search.net.train()(images), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.after_step()
        assert all(0 <= beta <= 1 for beta in search.betas().values())
    return search


def test_the_gate_opens_with_probability_beta():
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for beta in (0.1, 0.5, 0.9):
        gate = gumbel_gate(torch.full_like(noise, beta), noise, temperature=0.7)
        assert set(gate.round(decimals=5).tolist()) <= {0.0, 1.0}
        assert float(gate.mean()) == pytest.approx(beta, abs=0.012)


def test_the_gates_gradient_is_that_of_the_soft_sample():
    beta = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.4, 0.8], dtype=torch.float64)
    gumbel_gate(beta, noise, temperature=0.5).sum().backward()

    def soft(b: np.ndarray) -> np.ndarray:
        logits = np.log(b / (1 - b)) + np.log(noise.numpy() / (1 - noise.numpy()))
        return 1 / (1 + np.exp(-logits / 0.5))

    at, step = beta.detach().numpy(), 1e-6
    np.testing.assert_allclose(
        beta.grad.numpy(), (soft(at + step) - soft(at - step)) / (2 * step), rtol=1e-6
    )


def test_a_layer_has_one_of_two_numbers_of_bits():
    layer = TwoWayLayer(net()[3], BITS)
    layer.refresh()
    weight = layer.base.weight.detach()
    assert (layer.upper, layer.lower) == (8, 4)
    errors = {}
    for bits, gate in ((8, 1.0), (4, 0.0)):
        layer.gate = torch.tensor(gate)
        scale = best_scale(
            weight, Grid(bits, signed=True, narrow=True), symmetric=True, channels=True
        )[0]
        shown = layer.sampled().detach()
        places = shown / scale.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(places, places.round(), rtol=0, atol=1e-3)
        errors[bits] = float((shown - weight).square().sum() / weight.square().sum())
    assert layer.growth == pytest.approx(errors[4] - errors[8], rel=1e-4) and layer.growth > 0
    layer.level = 0
    assert layer.lower is None and layer.sampled() is not None


def test_the_expected_cost_falls_at_the_pace_whatever_the_merits_are():
    """``savings . movement = -pace``, and merits alone move betas apart."""
    search = made()
    search.before_step(0, 100)
    search.merit = torch.tensor([3.0, -1.0, 0.2])
    moved, saved = search._movement(), torch.tensor(search.savings())
    excess = 8 / 3.0 - 1
    assert float(saved @ moved) == pytest.approx(-(START - THRESHOLD) * excess / 50, rel=1e-4)
    search.merit = torch.tensor([-3.0, 1.0, -0.2])
    other = search._movement()
    assert float(saved @ other) == pytest.approx(float(saved @ moved), rel=1e-4)
    assert not torch.allclose(other, moved)
    scaled = made()
    scaled.before_step(0, 100)
    scaled.merit = torch.tensor([-3.0, 1.0, -0.2]) * 1e-6  # the loss in other units
    torch.testing.assert_close(scaled._movement(), other)


def test_bits_only_fall_and_fit_the_budget_in_time():
    search = learn(made(), 24)
    assert search.finished
    plan = search.settle()
    assert search.budget.cost(plan) <= search.budget.limit
    steps = [step for step, _ in search.history]
    assert steps == sorted(steps) and len(search.history) > 3 and steps[-1] < 24
    for (_, before), (_, after) in zip(search.history, search.history[1:], strict=False):
        changed = [n for n in before if before[n] != after[n]]
        assert len(changed) == 1
        name = changed[0]
        assert BITS.index(after[name]) == BITS.index(before[name]) - 1  # one candidate at a time


@pytest.mark.parametrize("mean", [2.0, 2.5, 6.0, 8.0])
def test_the_budget_holds_even_without_a_step(mean):
    search = made(mean)
    assert search.budget.fits(search.settle())
    if mean == 8.0:
        assert search.history == [(0, dict.fromkeys(("0", "3", "6"), 8))]


class TwoEyes(nn.Module):
    """Two branches of equal size: one sees the red channel alone, one the blue."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.red, self.blue = (nn.Conv2d(1, 4, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(4).repeat(1, 2))
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, blue = self.red(images[:, :1]), self.blue(images[:, 2:])
        return self.head(torch.cat([red, blue], dim=1).flatten(1))


@pytest.mark.parametrize("seen", ["red", "blue"])
def test_the_labels_decide_which_layer_keeps_its_bits(seen):
    """The same network and images; the task alone says which branch matters."""
    eyes = TwoEyes()

    def truth(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            one = images[:, :1] if seen == "red" else images[:, 2:]
            return getattr(eyes, seen)(one).flatten(1).argmax(1)

    wins = 0
    for seed in range(3):
        with torch.no_grad():
            search = made(5.0, of=eyes, bits=(2, 4, 8), seed=seed)
        bits = learn(search, 60, truth=truth, rate=1e-4, size=64).settle().w
        other = "blue" if seen == "red" else "red"
        wins += bits[seen] > bits[other]
    assert wins == 3


def test_the_weights_come_back_plain_and_the_student_stays():
    student, search = net(), learn(made(), 12)
    plain = search.trained()
    assert [type(m) for m in plain.modules()] == [type(m) for m in student.modules()]
    assert set(plain.state_dict()) == set(student.state_dict())
    assert not torch.equal(plain[3].weight, student[3].weight)


def test_a_kept_state_goes_on_exactly():
    whole, part, again = learn(made(), 16), learn(made(), 16, of=(0, 7)), made()
    again.net.load_state_dict(part.net.state_dict())
    again.load_state_dict(part.state_dict())
    assert not part.finished
    learn(again, 16, of=(7, 16))
    assert again.history == whole.history and again.betas() == whole.betas()
    one, other = whole.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
