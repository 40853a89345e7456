"""Fine-tuning: the schedule, the groups, the mixes and the losses, each against NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.train.finetune import (
    PlainTask,
    Schedule,
    apply_mix,
    draw_mix,
    parameter_groups,
)
from shared_core.datasets.views.mixing import Mix


def test_schedule_golden():
    base, total, warm = 0.4, 100, 10
    steps = np.arange(total)
    rise = base * (steps + 1) / warm
    turn = np.cos(np.pi * (steps - warm) / (total - warm))
    fall = base / 100 + (base - base / 100) * (1 + turn) / 2
    wanted = np.where(steps < warm, rise, fall)
    schedule = Schedule(base, total, warm)
    np.testing.assert_allclose([schedule.at(int(step)) for step in steps], wanted, rtol=1e-12)
    # By hand: a tenth at first, all of it after the rise, half way down in the middle, 1 % at last.
    assert schedule.at(0) == pytest.approx(0.04)
    assert schedule.at(9) == schedule.at(10) == pytest.approx(0.4)
    assert schedule.at(55) == pytest.approx(0.202)
    assert schedule.at(100) == schedule.at(5000) == pytest.approx(0.004)


def test_schedule_without_warm_up():
    schedule = Schedule(1.0, 2, 0)
    assert schedule.at(0) == 1.0 and schedule.at(1) == pytest.approx(0.505)
    assert Schedule(1.0, 1, 0).at(0) == 1.0


def test_parts_learn_at_rates_of_their_own():
    model = build_gfnet("gfnet-ti", img_size=8, patch_size=4, num_classes=3, embed_dim=6, depth=2)
    groups = parameter_groups(model, weight_decay=0.05, rates={"head": 0.5})
    rates = {id(p): (one["rate"], one["weight_decay"]) for one in groups for p in one["params"]}
    for name, parameter in model.named_parameters():
        flat = parameter.ndim <= 1 or name == "pos_embed"
        assert rates[id(parameter)] == (
            0.5 if name.startswith("head.") else 1.0,
            0.0 if flat else 0.05,
        )


def test_parameter_groups_of_a_gfnet():
    model = build_gfnet("gfnet-ti", img_size=8, patch_size=4, num_classes=3, embed_dim=6, depth=2)
    decay, plain = parameter_groups(model, weight_decay=0.05)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    assert decayed == {
        "patch_embed.proj.weight",
        "head.weight",
        *(
            f"blocks.{block}.{part}"
            for block in (0, 1)
            for part in ("filter.complex_weight", "mlp.fc1.weight", "mlp.fc2.weight")
        ),
    }
    rest = {names[id(parameter)] for parameter in plain["params"]}
    assert decayed | rest == set(names.values()) and not decayed & rest
    assert "pos_embed" in rest and "head.bias" in rest


def test_parameter_groups_leave_frozen_ones_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(2, 2)], [(2,)]]
    assert len(parameter_groups(model[1], weight_decay=0.1)) == 1


def options(**more: float) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 0, "mixup": 0.8, "cutmix": 1.0, **more})


def test_draw_mix_depends_on_seed_stage_and_step_only():
    def draw(step=3, stage="backbone", **more):
        np.random.seed(step)  # the global generators play no part
        torch.manual_seed(step)
        mix = draw_mix(options(**more), stage=stage, step=step, batch=8, size=16)
        return mix.lam, tuple(mix.permutation), mix.box

    first = draw()
    assert draw() == first
    others = [draw(step=4), draw(stage="distil"), draw(seed=1)]
    assert all(other != first for other in others)


def test_draw_mix_takes_both_half_of_the_time():
    mixes = [
        draw_mix(options(), stage="backbone", step=step, batch=4, size=16) for step in range(400)
    ]
    cut = sum(mix.box is not None for mix in mixes)
    assert 150 < cut < 250  # 200, standard deviation 10
    for mix in mixes:
        assert sorted(mix.permutation) == [0, 1, 2, 3] and 0 <= mix.lam <= 1
    args = {"stage": "x", "step": 0, "batch": 4, "size": 16}
    assert draw_mix(options(mixup=0, cutmix=0), **args) is None
    assert all(draw_mix(options(cutmix=0), **{**args, "step": s}).box is None for s in range(20))
    assert all(draw_mix(options(mixup=0), **{**args, "step": s}).box is not None for s in range(20))


def test_apply_mix_against_numpy():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(4, 3, 6, 6)), np.array([0, 1, 2, 1])
    order = np.array([2, 3, 1, 0])
    shares = np.eye(3)[labels] * 0.75 + np.eye(3)[labels][order] * 0.25
    x, y = torch.from_numpy(images), torch.from_numpy(labels)

    mixed, targets = apply_mix(Mix(0.75, order, None), x, y, num_classes=3)
    np.testing.assert_allclose(mixed, 0.75 * images + 0.25 * images[order], rtol=1e-6)
    np.testing.assert_allclose(targets, shares, rtol=1e-6)

    cut = images.copy()
    cut[:, :, 1:4, 2:5] = images[order][:, :, 1:4, 2:5]  # 9 of 36 pixels
    mixed, targets = apply_mix(Mix(0.75, order, (1, 2, 4, 5)), x, y, num_classes=3)
    np.testing.assert_array_equal(mixed, cut)
    np.testing.assert_allclose(targets, shares, rtol=1e-6)

    same, numbers = apply_mix(None, x, y, num_classes=3)
    assert same is x and numbers is y


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_smoothing_against_numpy(soft, smoothing):
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    model = nn.Linear(4, 3, bias=False)
    model.weight.data = torch.from_numpy(weight).float()
    labels = np.array([0, 2, 1, 1, 0])
    shares = np.eye(3)[labels]
    if soft:
        shares = 0.6 * shares + 0.4 * shares[::-1]
    z = x @ weight.T
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    wanted = -((shares * (1 - smoothing) + smoothing / 3) * log_p).sum(axis=1).mean()
    targets = torch.from_numpy(shares.copy()).float() if soft else torch.from_numpy(labels)
    found = PlainTask(model, smoothing=smoothing)(torch.from_numpy(x).float(), targets, 1.0)
    assert float(found["loss"].detach()) == pytest.approx(wanted, rel=1e-5)
