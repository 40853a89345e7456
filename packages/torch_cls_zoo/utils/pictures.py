"""Sheets of captioned pictures, and the confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from shared_core.checkpoints import atomic_write

CAPTION = 16  # pixels of a line
GOOD, BAD, INK = (0, 120, 0), (190, 0, 0), (0, 0, 0)  # RGB


def captioned_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[Sequence[str]],
    *,
    colors: Sequence[tuple[int, int, int]] | None = None,
    columns: int = 6,
    width: int = 128,
) -> np.ndarray:
    """Pictures in rows, the lines of their captions below each.

    Args:
        images: uint8 RGB ``(H, W, 3)`` of one size, at least one.
        captions: lines for each; all of as many lines.
        colors: of each caption's ink, RGB.
        columns: pictures in a row.
        width: least width of a picture, pixels; smaller ones are enlarged by whole factors.

    Returns:
        uint8 RGB ``(H, W, 3)``.

    Raises:
        ValueError: no images, or another number of captions.
    """
    if not images or len(captions) != len(images):
        raise ValueError(f"{len(images)} images and {len(captions)} captions, expected as many")
    factor = max(1, -(-width // images[0].shape[1]))
    lines = max(len(caption) for caption in captions)
    cells = []
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        large = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
        cell = cv2.copyMakeBorder(
            large, 2, lines * CAPTION + 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)
        )
        ink = INK if colors is None else colors[n]
        for line, text in enumerate(caption):
            place = (3, large.shape[0] + (line + 1) * CAPTION - 1)
            shown = _fitting(text, cell.shape[1] - 6)
            cv2.putText(cell, shown, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
        cells.append(cell)
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[n : n + columns], axis=1) for n in range(0, len(cells), columns)]
    return np.concatenate(rows)


def _fitting(text: str, pixels: int) -> str:
    """The text, cut so that it fits."""
    plain = text.encode("ascii", "replace").decode()
    while len(plain) > 1:
        if cv2.getTextSize(plain, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)[0][0] <= pixels:
            break
        plain = plain[:-1]
    return plain


def write_picture(path: Path, image: np.ndarray) -> Path:
    """Write uint8 RGB as PNG, all or nothing."""
    done, data = cv2.imencode(".png", image[..., ::-1])
    if not done:
        raise ValueError(f"{path}: the picture cannot be encoded")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda scratch: scratch.write_bytes(data.tobytes()))
    return path


def confusion_picture(
    confusion: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str]
) -> np.ndarray:
    """The confusion matrix: rows are the true classes; colour and percent are shares of the row.

    Args:
        confusion: counts ``(C, C)``.
        classes: C names.

    Returns:
        uint8 RGB ``(H, W, 3)``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = np.asarray(confusion, np.int64)
    number = len(matrix)
    if matrix.shape != (number, number) or len(classes) != number:
        raise ValueError(f"confusion {matrix.shape} with {len(classes)} classes, expected (C, C)")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.45 * number, 20)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if number <= 60:
        axes.set_xticks(range(number), classes, rotation=90)
        axes.set_yticks(range(number), classes)
    if number <= 25:
        for row in range(number):
            for column in range(number):
                if matrix[row, column]:
                    axes.text(
                        column, row, f"{matrix[row, column]}\n{100 * shares[row, column]:.0f} %",
                        ha="center", va="center", fontsize=8 if number <= 12 else 6,
                        color="white" if shares[row, column] > 0.6 else "black",
                    )  # fmt: skip
    figure.colorbar(shown, ax=axes, label="share of the true class", fraction=0.046)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
