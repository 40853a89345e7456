"""Contact sheets: small pictures in rows, each with a few readable lines below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets import DatasetError, decode
from shared_core.datasets.reading.image_headers import Pixels
from shared_core.texts import printable

SIDE = 150  # pixels of a picture
LINE = 19  # pixels of a line of text
GAP = 10  # pixels between tiles
SIZE = 13  # pixels of the letters
INK, QUIET = (28, 39, 51), (96, 108, 120)


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        path: of the image.
        lines: below it; the first in dark letters, the others lighter.
    """

    path: Path
    lines: tuple[str, ...]


def write_sheet(path: Path, tiles: Sequence[Tile], *, columns: int = 6) -> Path:
    """Write the tiles in rows as one JPEG, in their order.

    Raises:
        ValueError: no tiles, or fewer than one column.
    """
    if not tiles or columns < 1:
        raise ValueError(f"{len(tiles)} tiles in {columns} columns, expected at least one of both")
    columns = min(columns, len(tiles))
    high = SIDE + LINE * max(len(tile.lines) for tile in tiles) + GAP
    wide = SIDE + GAP
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * high + GAP, columns * wide + GAP, 3), 255, np.uint8)
    for n, tile in enumerate(tiles):
        top, left = GAP + n // columns * high, GAP + n % columns * wide
        sheet[top : top + SIDE, left : left + SIDE] = small_picture(tile.path, SIDE)
        for number, line in enumerate(tile.lines):
            at = (left, top + SIDE + LINE * (number + 1) - 5)
            write_text(sheet, line, at, QUIET if number else INK, width=SIDE)
    data = encode(sheet)
    atomic_write(path, lambda scratch: scratch.write_bytes(data))
    return path


def encode(image: Pixels, *, quality: int = 85) -> bytes:
    """A JPEG of an RGB image ``(H, W, 3)``."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return bytes(cv2.imencode(".jpg", image[..., ::-1], settings)[1].tobytes())


def small_picture(path: Path, side: int) -> Pixels:
    """The whole image on a light square, uint8 ``(side, side, 3)``; grey where it is unreadable."""
    square = np.full((side, side, 3), 240, np.uint8)
    try:
        image = decode(path)
    except (DatasetError, OSError):
        return square
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    top, left = (side - height) // 2, (side - width) // 2
    small = cv2.resize(image, (width, height), interpolation=method)
    square[top : top + height, left : left + width] = small
    return square


def write_text(
    sheet: Pixels, text: str, at: tuple[int, int], ink: tuple[int, int, int], *, width: int
) -> None:
    """Draw a line into ``sheet``, cut with dots at ``width`` pixels; any script that OpenCV has.

    OpenCV before 5 has Latin letters only: the rest comes out as code points.

    Args:
        at: left end of the base line, (x, y).
    """
    text = printable(text)
    if not hasattr(cv2, "FontFace"):
        text = text.encode("ascii", "backslashreplace").decode("ascii")
    while len(text) > 1 and _width(text) > width:
        text = text.removesuffix("…")[:-1] + "…" if hasattr(cv2, "FontFace") else text[:-1]
    put: Any = cv2.putText
    if hasattr(cv2, "FontFace"):
        put(sheet, text, at, ink, cv2.FontFace("uni"), SIZE)
    else:
        put(sheet, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)


def _width(text: str) -> int:
    size: Any = cv2.getTextSize
    if hasattr(cv2, "FontFace"):
        return int(size((0, 0), text, (0, 0), cv2.FontFace("uni"), SIZE)[2])
    return int(size(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)[0][0])
