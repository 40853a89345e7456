"""Pictures of a test: queries with their nearest neighbours, and the ROC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from landmark_distill.judging.verification import Verification
from shared_core.checkpoints import atomic_write
from shared_core.datasets import DecodeError, decode, letterbox

FRAME, GAP, TEXT = 4, 6, 16  # pixels
GREEN, RED, GREY, WHITE = (46, 160, 67), (207, 34, 46), (140, 149, 159), (255, 255, 255)
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Tile:
    """One image of the sheet."""

    image: Path | Picture | None  # None: not known; a grey field stands for it
    caption: str = ""
    right: bool | None = None  # whether it is of the query's class, where that is known


def contact_sheet(rows: Sequence[Sequence[Tile]], *, size: int = 112) -> Picture:
    """Draw the sheet.

    Args:
        rows: for each query its own tile, then its neighbours', the nearest first.
        size: of a tile in pixels.

    Returns:
        uint8 RGB ``(H, W, 3)``.

    Raises:
        ValueError: no rows, or a size below 16.
    """
    if not rows or not all(rows):
        raise ValueError("contact sheet: got no tiles, expected at least one in each row")
    if size < 16:
        raise ValueError(f"tiles of {size} pixels, expected at least 16")
    cell = size + 2 * FRAME
    columns = max(len(row) for row in rows)
    height = len(rows) * (cell + TEXT + GAP) + GAP
    width = columns * (cell + GAP) + 2 * GAP  # the query stands apart
    sheet = np.full((height, width, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            top = GAP + r * (cell + TEXT + GAP)
            left = GAP + c * (cell + GAP) + (GAP if c else 0)
            frame = GREY if tile.right is None else GREEN if tile.right else RED
            sheet[top : top + cell, left : left + cell] = WHITE if c == 0 else frame
            inner = sheet[top + FRAME : top + FRAME + size, left + FRAME : left + FRAME + size]
            inner[:] = _thumbnail(tile.image, size)
            _write(sheet, tile.caption, left, top + cell + TEXT - 5, cell)
    return sheet


def write_sheet(path: str | Path, rows: Sequence[Sequence[Tile]], *, size: int = 112) -> None:
    """Draw the sheet and write it as PNG."""
    sheet = contact_sheet(rows, size=size)
    good, data = cv2.imencode(".png", np.ascontiguousarray(sheet[..., ::-1]))
    if not good:
        raise ValueError(f"{path}: a sheet of {sheet.shape} pixels cannot be written as PNG")
    atomic_write(path, lambda scratch: scratch.write_bytes(data.tobytes()))


def _thumbnail(image: Path | Picture | None, size: int) -> Picture:
    missing = np.full((size, size, 3), 225, np.uint8)
    if image is None:
        return missing
    try:
        pixels = decode(image, min_size=(size, size)) if isinstance(image, Path) else image
        small: Picture = letterbox(pixels, (size, size), fill=225)
        return small
    except (DecodeError, OSError):  # the sheet shows the others all the same
        return missing


def _write(sheet: Picture, text: str, left: int, bottom: int, width: int) -> None:
    """Small letters; OpenCV's have no others than ASCII."""
    plain = text.encode("ascii", "replace").decode()
    fits = max(1, width // 7)
    if len(plain) > fits:
        plain = "~" + plain[-(fits - 1) :]
    cv2.putText(
        sheet, plain, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (50, 60, 70), 1, cv2.LINE_AA
    )


# -- ROC ------------------------------------------------------------------------------------------


def plot_roc(
    path: str | Path,
    curves: Mapping[str, Verification],
    *,
    marks: Sequence[float] = (),
    title: str = "Verification",
) -> None:
    """Write the plot as PNG.

    Args:
        curves: name -> rates at many targets; impostors that tie may leave the reached FAR below
            the target, and the reached one is drawn.
        marks: false-accept rates that get a dot.

    Raises:
        ValueError: no curves.
        ImportError: matplotlib is not installed.
    """
    if not curves:
        raise ValueError("ROC: got no curves, expected at least one")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    floor = min(1 / one.impostor for one in curves.values())
    for name, one in curves.items():
        points = sorted(
            (max(float(far), floor / 2), float(rate), target)
            for far, rate, target in zip(one.far, one.rates, one.far_targets, strict=True)
        )
        line = axes.plot([p[0] for p in points], [p[1] for p in points], label=name)[0]
        dots = [p for p in points if any(abs(p[2] - m) <= 1e-9 * m for m in marks)]
        axes.plot([p[0] for p in dots], [p[1] for p in dots], "o", ms=4, color=line.get_color())
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("false accepts / impostor pairs")
    axes.set_ylabel("genuine pairs accepted")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    atomic_write(path, lambda scratch: figure.savefig(scratch, format="png"))
