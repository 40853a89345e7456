"""The learning rate: the zoo's by epoch (warm-up, then steps), the user's own, or a cosine.

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

import math
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
    warmup: int | None = 5,
    kind: str = "steps",
    steps_per_epoch: int = 1,
    lr: float | None = None,
    lr_ratios: Sequence[float] | None = None,
    lr_steps: Sequence[int] | None = None,
) -> Schedule:
    """The schedule of the table, or ``lr_ratios`` up to the epochs ``lr_steps``, or a cosine.

    Args:
        warmup: epochs; None is a tenth of them.
        kind: ``steps`` or ``cosine``.
        steps_per_epoch: batches of an epoch.
        lr: the rate that is reported; that of the first group otherwise.

    Raises:
        ValueError: only one of the two lists, other lengths, steps that do not grow, a ratio that
            is not positive; or as :func:`piecewise_steps`.
    """
    if (lr_ratios is None) != (lr_steps is None):
        raise ValueError("--lr_ratios and --lr_steps: one is missing, expected both or none")
    if kind == "cosine":
        total = epochs * steps_per_epoch
        rising = max(1, total // 10) if warmup is None else warmup * steps_per_epoch
        return CosineSchedule(optimizer, rising, total, steps_per_epoch, lr)
    if lr_ratios is None or lr_steps is None:
        first = epochs // 10 if warmup is None else warmup
        steps, ratios = piecewise_steps(epochs, first), list(FACTORS)
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
    return PiecewiseSchedule(optimizer, steps, ratios, lr)


class Schedule:
    """Sets the learning rates of an optimizer's groups; all go up and down by one factor.

    A rate depends on nothing but the epoch or the step, so a resumed run needs no state;
    ``state_dict`` is there to check that it is the same schedule.
    """

    def __init__(self, optimizer: Optimizer, lr: float | None = None) -> None:
        self.optimizer = optimizer
        # A loaded optimizer state carries the rate of its epoch; the base is what was built.
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.lr = self.base[0] if lr is None else lr
        self.set_epoch(0)

    def factor(self, epoch: int) -> float:
        """What the base rates are multiplied by when ``epoch``, counted from 0, begins."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> float:
        """Set the rates for ``epoch`` (counted from 0) and return the reported one."""
        return self._set(self.factor(epoch))

    def set_step(self, step: int) -> None:
        """Set the rates for a step of the run, counted from 0."""

    def _set(self, factor: float) -> float:
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        return self.lr * factor

    def state_dict(self) -> dict[str, Any]:
        """What decides the rates."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the saved schedule is this one.

        Raises:
            ValueError: it is another.
        """
        if state != self.state_dict():
            raise ValueError(f"schedule is {self.state_dict()}, expected {state} as saved")


class PiecewiseSchedule(Schedule):
    """A factor for each stretch of epochs."""

    def __init__(
        self,
        optimizer: Optimizer,
        steps: Sequence[int],
        ratios: Sequence[float],
        lr: float | None = None,
    ) -> None:
        self.steps = [int(step) for step in steps]
        self.ratios = [float(ratio) for ratio in ratios]
        super().__init__(optimizer, lr)

    def factor(self, epoch: int) -> float:
        """What the base rate is multiplied by in ``epoch``, counted from 0."""
        return piecewise_factor(epoch, self.steps, self.ratios)

    def state_dict(self) -> dict[str, Any]:
        """Base rates and table."""
        return {"steps": self.steps, "ratios": self.ratios, "base": self.base}


class CosineSchedule(Schedule):
    """Rises over the first steps in a line, then falls to 0 along half a cosine.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 without restarts; the line:
    Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """

    def __init__(
        self, optimizer: Optimizer, rising: int, total: int, steps_per_epoch: int, lr: float | None
    ) -> None:
        self.rising, self.total, self.each = rising, total, steps_per_epoch
        super().__init__(optimizer, lr)

    def factor(self, epoch: int) -> float:
        """That of the epoch's first step."""
        return self.factor_of_step(epoch * self.each)

    def factor_of_step(self, step: int) -> float:
        """What the base rates are multiplied by in ``step`` of the run, counted from 0."""
        if step < self.rising:
            return (step + 1) / self.rising
        share = (step - self.rising) / max(1, self.total - self.rising)
        return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    def set_step(self, step: int) -> None:
        """Set the rates for a step of the run, counted from 0."""
        self._set(self.factor_of_step(step))

    def state_dict(self) -> dict[str, Any]:
        """Base rates and lengths."""
        return {"rising": self.rising, "total": self.total, "each": self.each, "base": self.base}
