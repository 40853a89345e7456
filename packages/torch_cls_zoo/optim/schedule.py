"""The zoo's learning rate by epoch: warm-up, then steps; or the user's own steps.

With ``d = (epochs - warmup) / 4`` the base rate is multiplied by

====================================  =======
epochs before                         factor
====================================  =======
``warmup``                            0.1
``warmup + int(1.5 d)``               1
``warmup + int(2.5 d)``               0.1
``warmup + int(3.5 d)``               0.01
``epochs``                            0.001
====================================  =======

The first row that fits decides; after the last row its factor stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

FACTORS = (0.1, 1.0, 0.1, 0.01, 0.001)


def piecewise_steps(epochs: int, warmup: int) -> list[int]:
    """The five boundaries of the table, in epochs.

    Raises:
        ValueError: no epochs, or a warm-up that is negative or longer than the run.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected 1 or more")
    if not 0 <= warmup <= epochs:
        raise ValueError(f"warmup is {warmup}, expected 0 to epochs ({epochs})")
    rest = epochs - warmup
    # Whole numbers: int(1.5 * rest / 4) without a rounding error.
    return [warmup, *(warmup + k * rest // 8 for k in (3, 5, 7)), epochs]


def piecewise_factor(epoch: int, steps: Sequence[int], ratios: Sequence[float]) -> float:
    """The ratio of the first step above ``epoch`` (counted from 0); the last one after all steps.

    Raises:
        ValueError: a negative epoch.
    """
    if epoch < 0:
        raise ValueError(f"epoch is {epoch}, expected 0 or more")
    for step, ratio in zip(steps, ratios, strict=True):
        if epoch < step:
            return ratio
    return ratios[-1]


def build_schedule(
    optimizer: Optimizer,
    *,
    epochs: int,
    warmup: int = 5,
    lr_ratios: Sequence[float] | None = None,
    lr_steps: Sequence[int] | None = None,
) -> PiecewiseSchedule:
    """The schedule of the table, or ``lr_ratios`` up to the epochs ``lr_steps`` in its place.

    Raises:
        ValueError: only one of the two lists, other lengths, steps that do not grow, a ratio that
            is not positive; or as :func:`piecewise_steps`.
    """
    if (lr_ratios is None) != (lr_steps is None):
        raise ValueError("--lr_ratios and --lr_steps: one is missing, expected both or none")
    if lr_ratios is None or lr_steps is None:
        steps, ratios = piecewise_steps(epochs, warmup), list(FACTORS)
    else:
        steps, ratios = list(lr_steps), list(lr_ratios)
        if len(steps) != len(ratios) or not steps:
            raise ValueError(
                f"--lr_ratios has {len(ratios)} values, --lr_steps {len(steps)}, "
                "expected as many, 1 or more"
            )
        if steps[0] < 1 or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"--lr_steps {steps}, expected epochs that grow, from 1")
        if not all(0 < ratio < float("inf") for ratio in ratios):
            raise ValueError(f"--lr_ratios {ratios}, expected numbers above 0")
    return PiecewiseSchedule(optimizer, steps, ratios)


class PiecewiseSchedule:
    """Sets the learning rate of an optimizer at the start of each epoch.

    ``set_epoch`` depends on nothing but the epoch, so a resumed run needs no state; ``state_dict``
    is there to check that it is the same schedule.
    """

    def __init__(self, optimizer: Optimizer, steps: Sequence[int], ratios: Sequence[float]) -> None:
        self.optimizer = optimizer
        self.steps = [int(step) for step in steps]
        self.ratios = [float(ratio) for ratio in ratios]
        # A loaded optimizer state carries the rate of its epoch; the base is what was built.
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.set_epoch(0)

    def factor(self, epoch: int) -> float:
        """What the base rate is multiplied by in ``epoch``, counted from 0."""
        return piecewise_factor(epoch, self.steps, self.ratios)

    def set_epoch(self, epoch: int) -> float:
        """Set the rate for ``epoch`` (counted from 0) and return that of the first group."""
        factor = self.factor(epoch)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Base rates and table."""
        return {"steps": self.steps, "ratios": self.ratios, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the saved schedule is this one.

        Raises:
            ValueError: it is another.
        """
        if state != self.state_dict():
            raise ValueError(f"schedule is {self.state_dict()}, expected {state} as saved")
