"""Optimisers: one rule of weight decay, Ralamb and Lookahead by hand, states that go on exactly."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torch_cls_zoo.optim import OPTIMIZERS, build_optimizer
from torch_cls_zoo.optim.ralamb import Ralamb


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def _steps(optimizer, model, count: int, *, start: int = 0) -> float:
    loss = torch.tensor(0.0)
    for number in range(start, start + count):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lamb", "lion", "lookahead_lamb", "lookahead_sgd"])
def test_the_loss_falls_and_a_saved_state_goes_on_exactly(name, tmp_path) -> None:
    model, other = _net(), _net()
    optimizer, again = (build_optimizer(name, net, 3e-2) for net in (model, other))
    first = _steps(optimizer, model, 1)
    _steps(optimizer, model, 8, start=1)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    last = _steps(optimizer, model, 40, start=9)
    assert last < first
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    _steps(again, other, 40, start=9)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lamb"])
def test_decay_shrinks_all_but_biases_and_is_outside_the_optimizer(name) -> None:
    """One step with decay = shrink by hand, then one step without; gradients are fixed."""
    model, twin = _net(), _net()
    decayed = build_optimizer(name, model, 0.1, weight_decay=0.3)
    plain = build_optimizer(name, twin, 0.1, weight_decay=0.0)
    with torch.no_grad():
        for key, p in twin.named_parameters():
            if not key.endswith("bias"):
                p *= 1 - 0.1 * 0.3
    for net in (model, twin):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.25)
    decayed.step()
    plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adamw_is_that_of_torch() -> None:
    model, twin = _net(), _net()
    ours = build_optimizer("adamw", model, 0.01, weight_decay=0.2)
    named = dict(twin.named_parameters())
    theirs = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in named.items() if not n.endswith("bias")],
                "weight_decay": 0.2,
            },
            {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    _steps(ours, model, 20)
    _steps(theirs, twin, 20)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_sgd_with_momentum_and_decay_is_the_loop() -> None:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 1.0)
    optimizer = build_optimizer("sgd", layer, 0.1, weight_decay=0.5, momentum=0.9)
    w, b, vw, vb = 2.0, 1.0, 0.0, 0.0
    for step in range(5):
        layer.weight.grad = torch.full((1, 1), 0.3 + step)
        layer.bias.grad = torch.full((1,), 0.1)
        optimizer.step()
        w -= 0.1 * 0.5 * w
        vw, vb = 0.9 * vw + 0.3 + step, 0.9 * vb + 0.1
        w, b = w - 0.1 * vw, b - 0.1 * vb
    assert layer.weight.item() == pytest.approx(w, rel=1e-5)
    assert layer.bias.item() == pytest.approx(b, rel=1e-5)


def test_ralamb_is_the_loop_in_float64() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(0, 3, 6)
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = Ralamb([parameter], lr=0.02, betas=(0.9, 0.99))
    w, m, v = start.copy(), np.zeros(6), np.zeros(6)
    longest = 2 / (1 - 0.99) - 1
    rectified = 0
    for t in range(1, 41):
        g = rng.normal(0, 1, 6)
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g * g
        rho = longest - 2 * t * 0.99**t / (1 - 0.99**t)
        step = m / (1 - 0.9**t)
        if rho > 5:
            rectified += 1
            r = math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
            step = r * step / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        w = w - 0.02 * min(np.linalg.norm(w), 10.0) / np.linalg.norm(step) * step
    assert 0 < rectified < 40
    np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-9)


def test_ralamb_without_the_ratio_is_radam() -> None:
    """Where the weights are as long as the step, the trust ratio is 1: one step of RAdam."""
    a, b = (nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64)) for _ in range(2))
    for p in (a, b):
        p.grad = torch.tensor([4.0, 3.0], dtype=torch.float64)  # as long as the weights: 5
    Ralamb([a], lr=0.1).step()
    torch.optim.RAdam([b], lr=0.1).step()
    torch.testing.assert_close(a, b)


def test_ralamb_moves_weights_that_are_all_zero() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    Ralamb([p], lr=0.5).step()
    assert torch.allclose(p.detach(), torch.full((3,), -0.5))


def test_lookahead_goes_half_way_back_every_six_steps() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    optimizer = build_optimizer("lookahead_sgd", layer, 0.1, weight_decay=0.0, momentum=0.0)
    fast, slow = 1.0, None
    for step in range(1, 25):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        fast -= 0.1
        if step % 6 == 0:  # the slow weights are first taken here, so the first time changes none
            slow = fast if slow is None else slow + 0.5 * (fast - slow)
            fast = slow
        assert layer.weight.item() == pytest.approx(fast, abs=1e-5)
    assert fast == pytest.approx(0.4 - 3 * 0.3)


def test_frozen_parameters_are_left_alone() -> None:
    model = _net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    _steps(build_optimizer("sgd", model, 0.1, weight_decay=0.5), model, 3)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("adma", {}, "--opt 'adma', expected one of sgd"),
        ("adahessian", {}, "second derivatives"),
        ("adam", {"lr": 0.0}, "--lr 0.0"),
        ("adam", {"lr": float("nan")}, "--lr nan"),
        ("adam", {"weight_decay": -1.0}, "--weight-decay -1"),
        ("sgd", {"momentum": 1.0}, "--momentum 1.0"),
    ],
)
def test_bad_settings_are_one_line(name, more, message) -> None:
    settings = {"lr": 0.1, **more}
    with pytest.raises(ValueError, match=message) as caught:
        build_optimizer(name, _net(), settings.pop("lr"), **settings)
    assert "\n" not in str(caught.value)


def test_nothing_to_train_is_refused() -> None:
    model = _net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer("adam", model, 0.1)
