"""The piecewise rule with warm-up: the published tables, and the user's own steps."""

import pytest
import torch

from torch_cls_zoo.optim import build_optimizer, build_schedule
from torch_cls_zoo.optim.schedule import piecewise_steps


def _schedule(**more):
    model = torch.nn.Linear(2, 2)
    return build_schedule(build_optimizer("sgd", model, 0.4), **more)


# First epoch, last epoch, factor.
GOLDEN = {
    85: [(0, 4, 0.1), (5, 34, 1), (35, 54, 0.1), (55, 74, 0.01), (75, 84, 0.001)],
    65: [(0, 4, 0.1), (5, 26, 1), (27, 41, 0.1), (42, 56, 0.01), (57, 64, 0.001)],
}


@pytest.mark.parametrize("epochs", GOLDEN)
def test_every_epoch_of_the_published_tables(epochs) -> None:
    schedule = _schedule(epochs=epochs, warmup=5)
    seen = 0
    for first, last, factor in GOLDEN[epochs]:
        for epoch in range(first, last + 1):
            assert schedule.factor(epoch) == factor, epoch
            assert schedule.set_epoch(epoch) == pytest.approx(0.4 * factor)
            assert all(
                group["lr"] == pytest.approx(0.4 * factor)
                for group in schedule.optimizer.param_groups
            )
            seen += 1
    assert seen == epochs


def test_steps_are_those_of_the_rule_as_it_is_written() -> None:
    for epochs in range(1, 130):
        for warmup in range(min(epochs, 12) + 1):
            quarter = (epochs - warmup) / 4
            expected = [warmup, *(warmup + int(k * quarter) for k in (1.5, 2.5, 3.5)), epochs]
            assert piecewise_steps(epochs, warmup) == expected


def test_own_ratios_and_steps_replace_both() -> None:
    ratios = [0.01 * 10**k for k in range(5)]
    schedule = _schedule(epochs=30, lr_ratios=ratios, lr_steps=[3, 6, 9, 12, 15])
    assert [schedule.factor(e) for e in range(15)] == [r for r in ratios for _ in range(3)]
    assert schedule.factor(15) == schedule.factor(29) == ratios[-1]


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert _schedule(epochs=8, warmup=0).factor(0) == 1.0
    assert _schedule(epochs=3, warmup=3).factor(2) == 0.1


def test_a_resumed_schedule_needs_the_epoch_alone() -> None:
    first, second = _schedule(epochs=85), _schedule(epochs=85)
    first.set_epoch(60)
    second.optimizer.load_state_dict(first.optimizer.state_dict())  # brings the rate of epoch 60
    second.load_state_dict(first.state_dict())
    assert second.set_epoch(61) == first.set_epoch(61) == pytest.approx(0.004)
    with pytest.raises(ValueError, match="as saved"):
        _schedule(epochs=65).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 5, "warmup": 6}, "warmup is 6"),
        ({"epochs": 5, "warmup": -1}, "warmup is -1"),
        ({"epochs": 9, "lr_ratios": [1.0]}, "one is missing"),
        ({"epochs": 9, "lr_ratios": [1.0, 2.0], "lr_steps": [3]}, "2 values, --lr_steps 1"),
        ({"epochs": 9, "lr_ratios": [], "lr_steps": []}, "1 or more"),
        ({"epochs": 9, "lr_ratios": [1.0, 2.0], "lr_steps": [3, 3]}, "epochs that grow"),
        ({"epochs": 9, "lr_ratios": [1.0, 0.0], "lr_steps": [3, 4]}, "numbers above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        _schedule(**settings)
