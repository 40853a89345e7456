"""Sheets of captioned pictures, and the confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core.checkpoints import atomic_write
from torch_cls_zoo.utils.fonts import drawable, figure_texts, font_for, letters_of

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
        captions: lines for each; all of as many lines. See :mod:`torch_cls_zoo.utils.fonts` for
            letters beyond ASCII.
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
    pen = Pen(line for caption in captions for line in caption)
    cells = []
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        large = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
        cell = cv2.copyMakeBorder(
            large, 2, lines * CAPTION + 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)
        )
        ink = INK if colors is None else colors[n]
        for line, text in enumerate(caption):
            place = (3, large.shape[0] + (line + 1) * CAPTION - 1)
            cell = pen.written(cell, text, place, ink)
        cells.append(cell)
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[n : n + columns], axis=1) for n in range(0, len(cells), columns)]
    return np.concatenate(rows)


class Pen:
    """Writes captions: plain ones by OpenCV, those with other letters in a font that has them."""

    def __init__(self, texts: Iterable[str]) -> None:
        letters = letters_of(texts)
        self.font = font_for(letters) if letters else None
        self._drawn: Any = None
        if self.font is not None:
            from PIL import ImageFont

            self._drawn = ImageFont.truetype(self.font.file, CAPTION - 4)

    def written(
        self, image: np.ndarray, text: str, place: tuple[int, int], ink: tuple[int, int, int]
    ) -> np.ndarray:
        """The image with the text from ``place`` on (left end of its base line, pixels), cut so
        that it fits."""
        text = drawable(text, self.font)
        while len(text) > 1 and self._width(text) > image.shape[1] - 6:
            text = text[:-1]
        if self._drawn is None:
            cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
            return image
        from PIL import Image, ImageDraw

        page = Image.fromarray(image)
        ImageDraw.Draw(page).text(place, text, fill=ink, font=self._drawn, anchor="ls")
        return np.asarray(page).copy()

    def _width(self, text: str) -> float:
        if self._drawn is not None:
            return float(self._drawn.getlength(text))
        return float(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)[0][0])


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
        with figure_texts(classes) as ready:
            axes.set_xticks(range(number), map(ready, classes), rotation=90)
            axes.set_yticks(range(number), map(ready, classes))
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
