"""The most probable classes drawn onto a picture, readable on any of its colours and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

SMALLEST = 240  # pixels: narrower pictures are enlarged so that the text fits
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_result(image: np.ndarray, ranked: Sequence[tuple[str, float]]) -> np.ndarray:
    """A copy of an RGB picture with a bar and a line of text for each class.

    Args:
        image: uint8 ``(H, W, 3)``.
        ranked: class names and probabilities in [0, 1], the best first.

    Returns:
        uint8 ``(H', W', 3)``, enlarged by a whole number when the picture is small.
    """
    factor = max(1, -(-SMALLEST // image.shape[1]))
    drawn = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
    height, width = drawn.shape[:2]
    scale = max(0.4, width / 900)
    thick = max(1, round(scale * 1.5))
    (_width, tall), below = cv2.getTextSize("Agf%", _FONT, scale, thick)
    bar = max(2, round(3 * scale))
    line = tall + below + bar + 4
    rows = min(len(ranked), max(1, height // line))
    dark = drawn[: rows * line].astype(np.float32) * 0.35  # a shade behind the text
    drawn[: rows * line] = dark.astype(np.uint8)
    for row, (name, share) in enumerate(ranked[:rows]):
        end = int(round(np.clip(share, 0, 1) * width))
        bottom = (row + 1) * line - 1
        drawn[max(0, bottom - bar) : bottom, :end] = (60, 200, 120)
        text = f"{share:6.1%} {_plain(name)}"
        place = (4, row * line + tall + 3)
        cv2.putText(drawn, text, place, _FONT, scale, (255, 255, 255), thick, cv2.LINE_AA)
    return drawn


def _plain(name: str) -> str:
    """OpenCV's font has ASCII only; other letters become their code points."""
    return name.encode("ascii", "backslashreplace").decode()
