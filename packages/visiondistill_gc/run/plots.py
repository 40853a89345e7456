"""Plots of a run, as PNG files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.checkpoints import atomic_write
from visiondistill_gc.utils.transforms import GarbageView


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    atomic_write(path, lambda target: figure.savefig(target, dpi=110, format="png"))
    return path


def training_curves(path: Path, lines: Sequence[dict[str, Any]], stages: Sequence[str]) -> Path:
    """Loss and accuracy by epoch: validation as lines, training dotted; a colour a stage."""
    figure = _figure(11, 4)
    axes = figure.subplots(1, 2)
    for index, stage in enumerate(stages):
        colour = f"C{index % 10}"
        for split, style in (("train", ":"), ("val", "-")):
            own = [line for line in lines if line["stage"] == stage and line["split"] == split]
            for axis, name in zip(axes, ("loss", "acc"), strict=True):
                axis.plot(
                    [line["step"] + 1 for line in own],
                    [line[name] for line in own],
                    style,
                    color=colour,
                    marker="." if len(own) < 3 else None,
                    label=stage if split == "val" else None,
                )
    axes[0].set(xlabel="epoch", ylabel="loss (dotted: training, all terms)")
    axes[1].set(xlabel="epoch", ylabel="accuracy (dotted: training, mixed images)", ylim=(0, 1))
    axes[1].legend(fontsize=8)
    return _save(figure, path)


def confusion(path: Path, matrix: np.ndarray, classes: Sequence[str]) -> Path:
    """Counts in a square, coloured by the fraction of the row."""
    size = max(4.0, 0.7 * len(classes) + 2)
    figure = _figure(size + 1, size)
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(classes)):
        for column in range(len(classes)):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(int(matrix[row, column]))
            axis.text(column, row, text, ha="center", va="center", color=colour)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=30, ha="right")
    axis.set_yticks(ticks, classes)
    axis.set(xlabel="predicted", ylabel="true")
    return _save(figure, path)


def precision_recall(
    path: Path, probs: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> Path:
    """Precision against recall of each class against the rest."""
    figure = _figure(6, 5)
    axis = figure.subplots()
    for index, name in enumerate(classes):
        order = np.argsort(-probs[:, index], kind="stable")
        hits = np.cumsum(labels[order] == index)
        if hits[-1]:
            axis.plot(hits / hits[-1], hits / np.arange(1, len(hits) + 1), label=name)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8)
    return _save(figure, path)


def sheet(
    path: Path, pictures: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]]
) -> Path:
    """Rows of pictures, uint8 RGB, with a line under each."""
    rows, columns = len(pictures), max(len(row) for row in pictures)
    figure = _figure(1.5 * columns, 1.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for row, (line, words) in enumerate(zip(pictures, captions, strict=True)):
        for column, (picture, text) in enumerate(zip(line, words, strict=True)):
            axes[row, column].imshow(picture)
            axes[row, column].set_title(text, fontsize=7)
    return _save(figure, path)


def augmentations(images: Any, view: GarbageView, rows: Sequence[int], *, views: int) -> list[Any]:
    """For each image: it as evaluation sees it, then ``views`` of its training views.

    Args:
        images: an ``ImageSet``.
        rows: which of them.

    Returns:
        A list of lists of uint8 ``(size, size, 3)``.
    """
    from shared_core.datasets import view_rng
    from visiondistill_gc.utils.transforms import eval_view

    plain = eval_view(view.size[0])
    lines = []
    for row in rows:
        image, key = images.image(row), images.keys[row]
        own = [view(image, view_rng(view.seed, key, number)) for number in range(views)]
        lines.append([plain(image), *own])
    return lines
