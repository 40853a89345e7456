"""Learning rates against tables made by hand, the original's formula and the corrected one."""

from __future__ import annotations

import math

import pytest
import torch

from landmark_distill.optimizers import build_optimizer, parameter_groups
from landmark_distill.schedules import Schedule, parse_milestones

SWIN = dict(lr=1e-3, min_lr=1e-6, max_epoch=200, warmup=10)
RESNET = dict(lr=1e-2, min_lr=1e-6, max_epoch=40, warmup=0)


def original(lr, min_lr, max_epoch, warmup, e):
    """The original's formula, e counted from 1."""
    if e < warmup:
        return lr * e / warmup
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * (e - warmup) / max_epoch))


@pytest.mark.parametrize(
    ("settings", "epoch", "step", "steps", "expected"),
    [
        (SWIN, 0, 0, 1000, 1.0e-4),
        (SWIN, 9, 0, 1000, 1.0e-3),  # e = 10
        (SWIN, 104, 0, 1000, 5.397e-4),  # e = 105
        (SWIN, 199, 999, 1000, 5.98e-6),  # e = 200.999, and never 1e-6
        (RESNET, 0, 0, 1000, 9.985e-3),
        (RESNET, 39, 0, 1000, 1.0e-6),  # e = 40
        (RESNET, 39, 999, 1000, 1.64e-5),  # e = 40.999, risen again
    ],
)
def test_rates_as_recorded(settings, epoch, step, steps, expected):
    assert Schedule("cosine", **settings).at(epoch, step, steps) == pytest.approx(
        expected, rel=2e-3
    )


@pytest.mark.parametrize("settings", [SWIN, RESNET])
def test_every_step_follows_the_original_formula(settings):
    schedule = Schedule("cosine", **settings)
    for epoch in range(settings["max_epoch"]):
        for step in (0, 3, 6):
            expected = original(**settings, e=epoch + 1 + step / 7)
            assert schedule.at(epoch, step, 7) == pytest.approx(expected, rel=1e-12)


def test_corrected_rises_from_one_step_and_ends_at_the_least():
    schedule = Schedule("cosine", **SWIN, cosine="corrected")
    rates = [schedule.at(e, s, 5) for e in range(200) for s in range(5)]
    assert rates[0] == pytest.approx(1e-3 / 50)  # the first of 50 warm-up steps
    assert rates[49] == pytest.approx(1e-3) and rates[50] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-6)
    assert all(a <= b for a, b in zip(rates[:50], rates[1:50], strict=False))
    assert all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False))
    middle = schedule.at(105, 0, 10**9)  # half way between warm-up and end
    assert middle == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-6)


def test_corrected_without_warm_up():
    schedule = Schedule("cosine", **RESNET, cosine="corrected")
    assert schedule.at(0, 0, 4) == pytest.approx(1e-2)
    assert schedule.at(39, 3, 4) == pytest.approx(1e-6)
    one = Schedule("cosine", lr=1.0, min_lr=0.5, max_epoch=1, cosine="corrected")
    assert one.at(0, 0, 1) == 0.5  # a run of one step


@pytest.mark.parametrize("cosine", ["original", "corrected"])
def test_steps_equal_torch(cosine):
    for kind, steps in (("step", (3,)), ("multistep", (2, 5, 6))):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        if kind == "step":
            theirs = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        else:
            theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(steps), 0.5)
        ours = Schedule(kind, lr=0.8, min_lr=0.0, max_epoch=9, steps=steps, cosine=cosine)
        for epoch in range(9):
            assert ours.at(epoch, 1, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()


def test_steps_after_a_warm_up():
    schedule = Schedule("step", lr=0.8, min_lr=0.0, max_epoch=9, warmup=2, steps=(3,))
    assert schedule.at(0, 0, 4) == pytest.approx(0.4)  # e = 1 of 2
    assert schedule.at(1, 0, 4) == pytest.approx(0.8)
    assert schedule.at(3, 0, 4) == pytest.approx(0.4)


@pytest.mark.parametrize("text", ["", "a", "0", "5,3", "3,3", "1.5"])
def test_bad_milestones(text):
    with pytest.raises(ValueError, match="rising"):
        parse_milestones(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(kind="linear"), "linear"),
        (dict(cosine="late"), "late"),
        (dict(warmup=300), "300"),
        (dict(min_lr=1.0), "min_lr"),
        (dict(kind="step", steps=(1, 2)), "step size"),
    ],
)
def test_bad_schedules(change, named):
    with pytest.raises(ValueError, match=named):
        Schedule(**{"kind": "cosine", **SWIN, **change})


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.relative_position_bias_table = torch.nn.Parameter(torch.zeros(3, 2))
        self.head = torch.nn.Linear(4, 2, bias=False)
        self.head.requires_grad_(False)


def test_groups_leave_norms_biases_tables_and_frozen_weights_out():
    net = Net()
    groups = parameter_groups(net.named_parameters(), weight_decay=0.1, decay_on="matrices")
    assert [len(group["params"]) for group in groups] == [1, 4]
    assert groups[0]["params"][0] is net.conv.weight
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    (everything,) = parameter_groups(net.named_parameters(), weight_decay=0.1)
    assert len(everything["params"]) == 5 and everything["weight_decay"] == 0.1
    assert all(p is not net.head.weight for p in everything["params"])


def test_sgd_with_momentum_takes_the_textbook_step():
    weight = torch.nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
    optimizer = build_optimizer("SGD", [("w", weight)], lr=0.1, weight_decay=0.01, momentum=0.9)
    value, speed = 1.0, 0.0
    for gradient in (0.5, -0.3, 0.2):
        weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
        speed = 0.9 * speed + gradient + 0.01 * value
        value -= 0.1 * speed
        assert weight.item() == pytest.approx(value, rel=1e-12)


def test_adamw_decays_apart_from_the_gradient():
    for kind in ("Adam", "AdamW"):
        weight = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
        optimizer = build_optimizer(kind, [("w", weight)], lr=0.1, weight_decay=0.5)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        # Adam normalises the decay's gradient away to a step of lr; AdamW shrinks by lr * decay.
        assert weight.item() == pytest.approx(1.9 if kind == "Adam" else 2.0 * 0.95, rel=1e-6)


def test_bad_optimizers():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    for words, named in (
        (dict(kind="Adam", momentum=0.9), "momentum"),
        (dict(kind="RMSprop"), "RMSprop"),
        (dict(kind="SGD", decay_on="some"), "some"),
    ):
        with pytest.raises(ValueError, match=named):
            build_optimizer(named=[("w", weight)], lr=0.1, weight_decay=0.0, **words)
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight learns"):
        build_optimizer("SGD", [("w", weight)], lr=0.1, weight_decay=0.0)
