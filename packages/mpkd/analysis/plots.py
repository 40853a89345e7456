"""The figures: curves, accuracy against size, bits of each layer; drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_core.metrics import pareto_front

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8e5ea2", "#e08e0b", "#40798c", "#6b6b6b")
PERCENT = 100.0


def new_figure(columns: int = 1, *, width: float = 6.0, height: float = 3.6) -> tuple[Any, Any]:
    """A figure that is drawn into memory only, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure: Any, path: Path) -> Path:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def curves(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> Path:
    """Loss, accuracy and agreement, learning rate by epoch, one line a stage and measure."""
    figure, (losses, shares, rates) = new_figure(3, width=4.4)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    for number, stage in enumerate(stages):
        colour = COLOURS[number % len(COLOURS)]
        own = [row for row in rows if row["stage"] == stage]
        epochs = [row["epoch"] for row in own]
        for axis, key, style, scale in (
            (losses, "train_loss", "-", 1.0), (losses, "val_loss", "--", 1.0),
            (shares, "val_acc", "-", PERCENT), (shares, "agreement", ":", PERCENT),
            (rates, "lr", "-", 1.0),
        ):  # fmt: skip
            points = [(e, row[key]) for e, row in zip(epochs, own, strict=True)]
            points = [(e, scale * v) for e, v in points if v is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, marker=".",
                          label=f"{stage}, {key}")  # fmt: skip
    for axis, name in ((losses, "loss"), (shares, "percent"), (rates, "learning rate")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(title)
    return save(figure, path)


def pareto(
    path: Path, points: Sequence[tuple[str, float, float]], *, xlabel: str, log: bool = True
) -> Path:
    """Accuracy (fraction) against a cost; the front is a line, dominated points are hollow.

    Args:
        points: ``(name, cost, accuracy)``, costs above 0.
    """
    figure, (axis,) = new_figure(width=7.2, height=4.4)
    costs, values = [p[1] for p in points], [PERCENT * p[2] for p in points]
    front = pareto_front(costs, values)
    axis.step([costs[n] for n in front], [values[n] for n in front], where="post", color="#9aa5b1")
    inside = set(front.tolist())
    for number, (name, cost, _) in enumerate(points):
        colour = COLOURS[number % len(COLOURS)]
        fill = colour if number in inside else "none"
        axis.plot([cost], [values[number]], "o", color=colour, markerfacecolor=fill)
        axis.annotate(name, (cost, values[number]), xytext=(5, 4), textcoords="offset points",
                      fontsize=7)  # fmt: skip
    if log:
        axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("test accuracy, percent")
    axis.grid(alpha=0.3)
    return save(figure, path)


def bit_bars(path: Path, bits: Mapping[str, Mapping[str, int]]) -> Path:
    """Bits of each layer, a group of bars a layer, one bar a network."""
    layers = list(dict.fromkeys(layer for own in bits.values() for layer in own))
    figure, (axis,) = new_figure(width=max(5.0, 0.7 * len(layers) + 2))
    width = 0.8 / max(1, len(bits))
    for number, (name, own) in enumerate(bits.items()):
        places = [n + (number - (len(bits) - 1) / 2) * width for n in range(len(layers))]
        axis.bar(places, [own.get(layer, 0) for layer in layers], width, label=name,
                 color=COLOURS[number % len(COLOURS)])  # fmt: skip
    axis.set_xticks(range(len(layers)), layers, rotation=45, ha="right", fontsize=7)
    axis.set_ylabel("bits a weight")
    figure.legend(fontsize=7, loc="outside upper center", ncols=3)  # bars reach up to the top
    return save(figure, path)


def bars(
    path: Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float] | None]],
    *,
    ylabel: str,
) -> Path:
    """Means with deviations, one group of bars for each of ``groups``, one colour a series."""
    figure, (axis,) = new_figure(width=max(6.0, 1.1 * len(groups) + 2), height=4.2)
    width = 0.8 / max(1, len(series))
    lowest = 1.0
    for number, (name, values) in enumerate(series.items()):
        for place, value in enumerate(values):
            if value is None:
                continue
            x = place + (number - (len(series) - 1) / 2) * width
            lowest = min(lowest, value[0] - value[1])
            axis.bar(x, PERCENT * value[0], width, yerr=PERCENT * value[1], capsize=2,
                     color=COLOURS[number % len(COLOURS)],
                     label=name if place == _first(values) else None)  # fmt: skip
    axis.set_ylim(bottom=max(0.0, PERCENT * lowest - 5))
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    return save(figure, path)


def _first(values: Sequence[Any]) -> int:
    return next(n for n, value in enumerate(values) if value is not None)
