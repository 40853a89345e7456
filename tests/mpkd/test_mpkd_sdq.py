"""SDQ: gates with the right chances and gradients, betas in [0, 1], bits that only fall."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.quant.budget import layer_options, size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.fake_quant import Grid, best_scale
from mpkd.quant.qat import QatLoss, train
from mpkd.quant.search.sdq import SdqRun, TwoWayLayer, gumbel_gate
from shared_core.for_torch.run_state import StageState
from shared_core.runs import StageLog

BITS = (2, 3, 4, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def made(mean: float = 3.0, *, steps: int = 12, **more) -> SdqRun:
    facts = layer_facts(net(), 8)
    w = layer_options(facts, BITS, first_last=None)
    budget = size_budget(facts, mean, w_options=w, a_options=dict.fromkeys(w, (32,)))
    return SdqRun(
        net(), budget, QatLoss(temperature=2.0), steps=steps, learning_rate=1e-3, teacher=net(),
        **more,
    )  # fmt: skip


def batches(epoch: int):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(6):
        yield torch.randn(8, 3, 8, 8, generator=generator), None


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
    weight = layer.base.weight.detach()
    assert (layer.upper, layer.lower) == (8, 4)
    levels = {}
    for bits, gate in ((8, 1.0), (4, 0.0)):
        layer.gate = torch.tensor(gate)
        scale = best_scale(
            weight, Grid(bits, signed=True, narrow=True), symmetric=True, channels=True
        )[0]
        places = layer.sampled().detach() / scale.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(places, places.round(), rtol=0, atol=1e-3)
        levels[bits] = float(layer.error().detach())
        wanted = ((layer.sampled() - weight) ** 2).sum() / (weight**2).sum()
        assert levels[bits] == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert levels[4] > 10 * levels[8]
    assert layer.growth() == pytest.approx(levels[4] - levels[8], rel=1e-4)
    layer.level = 0
    assert layer.lower is None and layer.sampled() is not None


@pytest.mark.parametrize("rate", [None, 1.0, 50.0])
def test_betas_stay_in_range_and_bits_only_fall(rate):
    run = made(steps=24, beta_rate=rate)
    for epoch in range(4):
        for images, _ in batches(epoch):
            run.step(images)
            assert all(0 <= beta <= 1 for beta in run.betas().values())
    plan = run.settle()
    assert run.budget.cost(plan) <= run.budget.limit
    steps = [step for step, _ in run.history]
    assert steps == sorted(steps) and len(run.history) > 3
    for (_, before), (_, after) in zip(run.history, run.history[1:], strict=False):
        changed = [n for n in before if before[n] != after[n]]
        assert len(changed) == 1
        name = changed[0]
        assert BITS.index(after[name]) == BITS.index(before[name]) - 1  # one candidate at a time
    if rate is None:
        assert run.finished and steps[-1] < 24  # the default pace gets there in time


@pytest.mark.parametrize("mean", [2.0, 2.5, 6.0, 8.0])
def test_the_budget_holds_even_without_a_step(mean):
    run = made(mean)
    assert run.budget.fits(run.settle())
    if mean == 8.0:
        assert run.history == [(0, dict.fromkeys(("0", "3", "6"), 8))]


def test_error_and_pressure_pull_in_opposite_directions():
    held, pushed = made(strength=1e4, pressure=1e-6), made(strength=0.0, pressure=1.0)
    for run in (held, pushed):
        run.beta_rate = 1e-3 * (1e-6 if run is held else 1)
        for images, _ in batches(0):
            run.step(images)
    assert max(pushed.betas().values()) < 0.9 <= max(held.betas().values())


def test_the_weights_come_back_plain_and_the_student_stays():
    student = net()
    run = made()
    train(run, batches, epochs=2, steps_an_epoch=6)
    plain = run.trained()
    assert [type(m) for m in plain.modules()] == [type(m) for m in student.modules()]
    assert set(plain.state_dict()) == set(student.state_dict())
    assert not torch.equal(plain[3].weight, student[3].weight)


@pytest.mark.parametrize("stop", [4, 9])
def test_a_stopped_search_goes_on_exactly(tmp_path, stop):
    def go(folder, stop_after=None):
        run = made()

        def source(epoch):
            for index, batch in enumerate(batches(epoch)):
                if epoch * 6 + index == stop_after:
                    raise KeyboardInterrupt
                yield batch

        saved = StageState("sdq", {"run": run}, StageLog(folder))
        train(run, source, epochs=2, steps_an_epoch=6, saved=saved, save_every=1)
        return run

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", stop)
    again = go(tmp_path / "cut")
    assert again.history == whole.history and again.betas() == whole.betas()
    one, other = whole.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_threshold_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="expected between 0 and 0.9"):
        made(threshold=0.95)
