"""The pictures of the report, drawn without a display."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#2166ac", "#b2182b", "#4d9221", "#7b3294", "#e08214", "#35978f", "#525252")
# Marker and size: two wishes may get the same thresholds, and both must be seen.
WISHES = {"careful": ("o", 15), "balanced": ("s", 10), "fast": ("^", 6)}


def colours(count: int) -> list[Any]:
    """So many different colours: the usual ones, or steps of one scale where these run out."""
    from matplotlib import colormaps

    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colormaps["viridis"](index / (count - 1)) for index in range(count)]


def save_figure(
    folder: Path, name: str, draw: Callable[[Any], None], *, size: tuple[float, float]
) -> Path:
    """One figure with one axis grid, drawn by ``draw(figure)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    path = folder / f"{name}.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in another script
        figure.savefig(path)
    return path


def accuracy_cost(
    folder: Path, measured: dict[str, Any], sweep: Any, others: dict[str, Any]
) -> Path:
    """Test accuracy against MACs: every rule over its thresholds, the points, the plain nets."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for colour, (kind, other) in zip(COLOURS[2:], others.items(), strict=False):
            axis.plot(other.cost / 1e6, other.accuracy, color=colour, lw=0.8, label=kind)
        kind = measured["exits"]["policy"]
        axis.plot(sweep.cost / 1e6, sweep.accuracy, color=COLOURS[0], lw=2, label=f"{kind}, used")
        for name, (marker, size) in WISHES.items():
            point = measured["exits"]["points"][name]
            axis.plot(
                point["macs"] / 1e6,
                point["accuracy"],
                marker,
                color=COLOURS[0],
                fillstyle="none" if size > 6 else "full",
                ms=size,
                label=f"{name} (measured with real exits)",
            )
        for name, colour in (("backbone", COLOURS[6]), ("student", COLOURS[1])):
            if name in measured:
                axis.plot(
                    measured[name]["macs"] / 1e6,
                    measured[name]["accuracy"],
                    "D",
                    color=colour,
                    ms=9,
                    label=f"{name} without exits",
                )
        for name, style in (("plain", ":"), ("engineered", "--")):
            if "floor" in measured:
                axis.axhline(
                    measured["floor"][name],
                    color="#888888",
                    ls=style,
                    lw=1,
                    label=f"{name} features, linear classifier",
                )
        axis.set(xlabel="mean MACs an image (millions)", ylabel="test accuracy", xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    return save_figure(folder, "accuracy-cost", draw, size=(7.5, 4.8))


def accuracy_time(folder: Path, measured: dict[str, Any], *, unit: str) -> Path:
    """Test accuracy against measured time, one panel a batch size."""
    exits = measured["exits"]
    labels = list(exits["ms_per_image_without_exits"])

    def draw(figure: Any) -> None:
        for axis, label in zip(
            figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True
        ):
            for name, (marker, size) in WISHES.items():
                point = exits["points"][name]
                axis.plot(
                    point["ms_per_image"][label],
                    point["accuracy"],
                    marker,
                    color=COLOURS[0],
                    fillstyle="none" if size > 6 else "full",
                    ms=size,
                    label=f"exits, {name}",
                )
            axis.plot(
                exits["ms_per_image_without_exits"][label],
                exits["final_accuracy"],
                "X",
                color=COLOURS[2],
                ms=10,
                label="same net, no exits",
            )
            for name, colour in (("backbone", COLOURS[6]), ("student", COLOURS[1])):
                if name in measured:
                    axis.plot(
                        measured[name]["ms_per_image"][label],
                        measured[name]["accuracy"],
                        "D",
                        color=colour,
                        ms=8,
                        label=name,
                    )
            axis.set(
                title=label, xlabel=f"ms an image ({unit})", ylabel="test accuracy", xlim=(0, None)
            )
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)

    return save_figure(folder, "accuracy-time", draw, size=(5 * len(labels), 4.2))


def exit_rates(
    folder: Path, rates: np.ndarray, classes: Sequence[str], exits: Sequence[int]
) -> Path:
    """Where the samples of each class leave, easiest class on top."""
    order = np.argsort(-(rates @ -np.arange(rates.shape[1])))
    names = [f"after block {e}" for e in exits] + ["final head"]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        left = np.zeros(len(classes))
        shades = [(0.13 + 0.75 * i / max(1, len(names) - 1)) for i in range(len(names))]
        from matplotlib import colormaps

        for index, name in enumerate(names):
            width = np.nan_to_num(rates[order, index])
            axis.barh(
                np.arange(len(classes)),
                width,
                left=left,
                label=name,
                color=colormaps["viridis"](shades[index]),
            )
            left += width
        names_in_order = [classes[i] for i in order]  # a dollar in a name is no formula
        axis.set_yticks(np.arange(len(classes)), names_in_order, fontsize=8, parse_math=False)
        axis.invert_yaxis()
        axis.set(xlabel="share of the class's test images", xlim=(0, 1))
        axis.legend(
            fontsize=8, ncols=min(5, len(names)), loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )

    return save_figure(folder, "exit-rates", draw, size=(7.5, 1.6 + 0.22 * len(classes)))


def reliability(
    folder: Path, probabilities: np.ndarray, labels: np.ndarray, exits: Sequence[int]
) -> Path:
    """Reliability of every exit on the test split, after its temperature; 10 equal-width bins."""
    from shared_core.metrics import ece, reliability_curve

    names = [f"block {e}" for e in exits] + ["final"]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for index, (axis, name) in enumerate(zip(axes, names, strict=True)):
            curve = reliability_curve(probabilities[index], labels, bins=10)
            shown = curve.count > 0
            axis.plot([0, 1], [0, 1], color="#888888", lw=1, ls="--")
            axis.plot(
                curve.confidence[shown],
                curve.accuracy[shown],
                "o-",
                color=COLOURS[0],
                ms=4,
                clip_on=False,
            )
            value = ece(probabilities[index], labels, scheme="mass")
            axis.set(
                title=f"{name}, ECE {value:.3f}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1)
            )
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy")

    return save_figure(folder, "reliability", draw, size=(2.3 * len(names) + 0.6, 2.9))


def samples_per_exit(
    folder: Path,
    images: Sequence[Sequence[np.ndarray]],
    captions: Sequence[Sequence[str]],
    exits: Sequence[int],
) -> Path:
    """A row of test images for each exit: what is easy and what is hard."""
    names = [f"leave after\nblock {e}" for e in exits] + ["reach the\nfinal head"]
    columns = max(1, max(len(row) for row in images))

    def draw(figure: Any) -> None:
        heights = [1.0 if row else 0.35 for row in images]
        grid = figure.subplots(
            len(names), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axes, row, texts, name in zip(grid, images, captions, names, strict=True):
            for column, axis in enumerate(axes):
                axis.set_xticks([])
                axis.set_yticks([])
                for side in axis.spines.values():
                    side.set_visible(False)
                if column == 0:
                    axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
                if column < len(row):
                    axis.imshow(row[column])
                    axis.set_title(texts[column], fontsize=6.5, pad=2, parse_math=False)
                elif not row and column == 0:
                    axis.text(0.5, 0.5, "nobody", ha="center", va="center", fontsize=8)

    height = sum(1.35 if row else 0.5 for row in images)
    return save_figure(folder, "samples-per-exit", draw, size=(1.15 * columns + 0.9, height))


def training_curves(folder: Path, lines: Sequence[dict[str, Any]], exits: Sequence[int]) -> Path:
    """Loss and calibration accuracy of every stage by epoch."""

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        loss, acc, heads = figure.subplots(1, 3)
        for colour, stage in zip(COLOURS, ("backbone", "distil"), strict=False):
            train = [x for x in lines if x["stage"] == stage and x["split"] == "train"]
            val = [x for x in lines if x["stage"] == stage and x["split"] == "val"]
            loss.plot(
                [x["step"] + 1 for x in train],
                [x["loss"] for x in train],
                ".-",
                color=colour,
                label=stage,
            )
            epochs = [x["step"] + 1 for x in val]
            acc.plot(epochs, [x["acc"] for x in val], ".-", color=colour, label=stage)
        val = [x for x in lines if x["stage"] == "exits" and x["split"] == "val"]
        steps = [x["step"] + 1 for x in val]
        for colour, block in zip(colours(len(exits)), exits, strict=True):
            values = [x[f"acc{block}"] for x in val]
            heads.plot(steps, values, ".-", color=colour, label=f"exit {block}")
        heads.plot(steps, [x["acc_final"] for x in val], ".-", color="#000000", label="final")
        heads.plot(steps, [x["gated_acc"] for x in val], ".--", color="#888888", label="gated")
        for axis, title in (
            (loss, "training loss (nats)"),
            (acc, "calibration accuracy"),
            (heads, "exits, calibration accuracy"),
        ):
            axis.set(title=title, xlabel="epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)

    return save_figure(folder, "training", draw, size=(11, 3.4))
