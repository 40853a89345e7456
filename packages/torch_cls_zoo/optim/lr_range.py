"""LR-range test: raise the learning rate step by step and watch the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim import Optimizer

LEAST_STEPS = 5


@dataclass(frozen=True)
class LrRange:
    """What the test saw; all lists have one entry a step."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]  # see two_sided
    suggestion: float  # where the smoothed loss falls fastest
    largest: float  # the rate with the least smoothed loss: take no more
    diverged: bool  # the test stopped before its end

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "lrs": self.lrs,
            "losses": self.losses,
            "smoothed": self.smoothed,
            "suggestion": self.suggestion,
            "largest": self.largest,
            "diverged": self.diverged,
        }


def lr_range(
    step: Callable[[], float],
    optimizer: Optimizer,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    smooth: float = 0.9,
    stop: float = 4.0,
) -> LrRange:
    """Run ``steps`` training steps at rates from ``low`` to ``high``, evenly on a log scale.

    The model and the optimizer's moments are changed; give copies or restore them. The learning
    rates of the optimizer's groups are put back.

    Args:
        step: one training step with the optimizer; returns its loss.
        optimizer: its groups all get the rate of the step.
        low: first rate, above 0.
        high: last rate, above ``low``.
        steps: 5 or more.
        smooth: weight of the past in the moving averages, in [0, 1).
        stop: end early when the average so far exceeds this times its least value or is not
            finite.

    Raises:
        ValueError: a value out of range, or a loss that was not finite from the start.

    Source: Smith 2017, arXiv:1506.01186, section 3.3.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"LR range {low} to {high}, expected 0 < low < high")
    if steps < LEAST_STEPS:
        raise ValueError(f"LR range in {steps} steps, expected {LEAST_STEPS} or more")
    if not 0 <= smooth < 1 or not stop > 1:
        raise ValueError(f"LR range: smooth {smooth}, stop {stop}; expected in [0, 1) and above 1")
    before = [group["lr"] for group in optimizer.param_groups]
    lrs: list[float] = []
    losses: list[float] = []
    average, least_level, diverged = 0.0, math.inf, False
    try:
        for rate in np.geomspace(low, high, steps):
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            loss = float(step())
            average = smooth * average + (1 - smooth) * loss
            level = average / (1 - smooth ** (len(losses) + 1))
            if not math.isfinite(level):
                diverged = True
                break
            lrs.append(float(rate))
            losses.append(loss)
            least_level = min(least_level, level)
            if level > stop * least_level and len(losses) >= LEAST_STEPS:
                diverged = True
                break
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
    if len(lrs) < LEAST_STEPS:
        raise ValueError(
            f"LR range: the loss was finite for {len(lrs)} steps only, expected {LEAST_STEPS}; "
            "lower the first rate"
        )
    level = np.array(two_sided(losses, smooth))
    least = int(np.argmin(level))
    end = max(least + 1, 3)  # the fall before the least point; after it the loss rises
    slopes = np.gradient(level[:end], np.log(np.array(lrs[:end])))
    return LrRange(lrs, losses, level.tolist(), lrs[int(np.argmin(slopes))], lrs[least], diverged)


def two_sided(values: list[float], smooth: float) -> list[float]:
    """Mean of the moving averages from either end, each corrected for its start.

    One average alone lags behind, and would name rates that are too large.
    """

    def one_sided(line: list[float]) -> list[float]:
        average, found = 0.0, []
        for number, value in enumerate(line, start=1):
            average = smooth * average + (1 - smooth) * value
            found.append(average / (1 - smooth**number))
        return found

    backward = one_sided(values[::-1])[::-1]
    return [(a + b) / 2 for a, b in zip(one_sided(values), backward, strict=True)]


def plot_lr_range(result: LrRange, path: str | Path) -> None:
    """Write the curve as a PNG: loss of each step, smoothed loss, suggestion and largest rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(result.lrs, result.losses, color="#9fb3c8", linewidth=1, label="loss of the step")
    axes.plot(result.lrs, result.smoothed, color="#1f5a92", linewidth=2, label="smoothed")
    axes.axvline(result.suggestion, color="#2a9d57", linestyle="--", linewidth=1.2,
                 label=f"falls fastest: {result.suggestion:.2g}")  # fmt: skip
    axes.axvline(result.largest, color="#c0392b", linestyle=":", linewidth=1.4,
                 label=f"least loss: {result.largest:.2g}")  # fmt: skip
    axes.set_xscale("log")
    top = max(result.smoothed[0] * 1.6, min(result.smoothed) * 2.5)
    axes.set_ylim(min(result.losses) - 0.05 * top, top)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats)")
    axes.set_title("LR-range test" + (" (stopped: the loss grew)" if result.diverged else ""))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(str(path))
