"""The LR-range test: the rates, the smoothing and the suggestion on a loss known by formula."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torch_cls_zoo.optim.lr_range import lr_range, plot_lr_range


def _optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)


def _curve(optimizer):
    """A loss that falls fastest at 1e-3, is least at 1e-1 and then explodes."""

    def step() -> float:
        x = math.log10(optimizer.param_groups[0]["lr"])
        fall = 1 / (1 + math.exp(3 * (x + 3)))
        return 0.5 + fall + math.exp(6 * (x + 0.4))

    return step


def test_rates_smoothing_and_suggestion() -> None:
    optimizer = _optimizer()
    found = lr_range(_curve(optimizer), optimizer, low=1e-6, high=10.0, steps=140, smooth=0.0)
    np.testing.assert_allclose(found.lrs, np.geomspace(1e-6, 10, 140)[: len(found.lrs)])
    assert found.smoothed == pytest.approx(found.losses)
    assert found.diverged and len(found.lrs) < 140
    assert found.suggestion == pytest.approx(1e-3, rel=0.25)
    assert 2e-2 < found.largest < 0.3
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_average_is_corrected_for_its_start() -> None:
    optimizer = _optimizer()
    losses = iter([4.0, 2.0, 3.0, 1.0, 2.0])
    found = lr_range(
        lambda: next(losses), optimizer, low=0.1, high=1.0, steps=5, smooth=0.5, stop=10
    )
    values = np.array([4.0, 2.0, 3.0, 1.0, 2.0])
    expected = []
    for here in range(5):
        weights = 0.5 ** np.arange(5)  # of a value by its distance
        before, after = values[: here + 1][::-1], values[here:]
        sides = [np.average(side, weights=weights[: len(side)]) for side in (before, after)]
        expected.append(np.mean(sides))
    assert found.smoothed == pytest.approx(expected) and not found.diverged


def test_smoothing_does_not_move_the_suggestion() -> None:
    optimizer = _optimizer()
    found = lr_range(_curve(optimizer), optimizer, low=1e-6, high=10.0, steps=140, smooth=0.9)
    assert found.suggestion == pytest.approx(1e-3, rel=0.35)


def test_a_loss_that_is_not_finite_ends_the_test() -> None:
    optimizer = _optimizer()
    losses = iter([3.0, 2.9, 2.5, 2.0, 1.9, 1.8, math.nan])
    found = lr_range(lambda: next(losses), optimizer, low=0.1, high=1.0, steps=30)
    assert found.diverged and len(found.losses) == 6
    with pytest.raises(ValueError, match="finite for 0 steps"):
        lr_range(lambda: math.inf, optimizer, low=0.1, high=1.0, steps=10)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "settings", [{"low": 0.0}, {"low": 2.0, "high": 1.0}, {"steps": 4}, {"smooth": 1.0}]
)
def test_bad_settings_are_refused(settings) -> None:
    with pytest.raises(ValueError, match="LR range"):
        lr_range(lambda: 1.0, _optimizer(), **settings)


def test_the_plot_is_written(tmp_path) -> None:
    optimizer = _optimizer()
    found = lr_range(_curve(optimizer), optimizer, low=1e-6, high=10.0, steps=60)
    plot_lr_range(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
