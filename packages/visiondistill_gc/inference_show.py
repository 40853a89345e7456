"""What ``--show`` does: each image with its prediction, in a window or as a picture on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets import decode

WIDTH = 480  # pixels of a picture
LINE = 30  # pixels of a line of text
DEFAULT_FOLDER = Path("inference_results")


def has_display() -> bool:
    """Whether a window can be opened: always on Windows and macOS, else where a server is named."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def annotate(image: np.ndarray, top: list[dict[str, Any]]) -> np.ndarray:
    """The image with a panel below it: a line and a bar for each class, best first.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        top: ``class`` and ``probability``, best first.

    Returns:
        uint8 RGB ``(H', 480, 3)``.
    """
    height = max(1, round(image.shape[0] * WIDTH / image.shape[1]))
    method = cv2.INTER_AREA if image.shape[1] > WIDTH else cv2.INTER_LINEAR
    scaled = cv2.resize(image, (WIDTH, height), interpolation=method)
    panel = np.full((LINE * len(top) + 10, WIDTH, 3), 255, np.uint8)
    for n, one in enumerate(top):
        y = 5 + n * LINE
        color = (46, 125, 79) if n == 0 else (160, 185, 170)
        length = round(one["probability"] * (WIDTH - 20))
        cv2.rectangle(panel, (10, y + 22), (10 + length, y + 27), color, thickness=-1)
        _text(panel, one["class"], (10, y + 17))
        _text(panel, f"{one['probability']:.4f}", (WIDTH - 80, y + 17))
    return np.concatenate([scaled, panel])


def _text(panel: np.ndarray, text: str, at: tuple[int, int]) -> None:
    """Draw a line; OpenCV before 5 has Latin letters only, the rest comes out as code points."""
    ink = (29, 43, 36)
    if hasattr(cv2, "FontFace"):
        cv2.putText(panel, text, at, ink, cv2.FontFace("uni"), 16)
        return
    plain = text.encode("ascii", "backslashreplace").decode("ascii")
    cv2.putText(panel, plain, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, ink, 1, cv2.LINE_AA)


class Shower:
    """Shows rows of ``inference.predict`` one after the other.

    Args:
        folder: where pictures go; None means ``inference_results``.
        window: open windows instead; where OpenCV cannot, pictures are written all the same.
    """

    def __init__(self, folder: Path | None, *, window: bool) -> None:
        self.folder = DEFAULT_FOLDER if folder is None else folder
        self.window = window
        self._written: set[str] = set()

    def __enter__(self) -> Shower:
        return self

    def __exit__(self, *_: object) -> None:
        if self._written:
            print(f"wrote {len(self._written)} pictures to {self.folder}")

    def show(self, row: dict[str, Any]) -> None:
        """Open a window until a key is pressed, or write ``<name>.png``."""
        picture = annotate(decode(Path(row["path"])), row["top"])
        if self.window:
            try:
                cv2.imshow("visiondistill_gc", picture[..., ::-1])
                cv2.waitKey(0)
                return
            except cv2.error:  # a build without windows, or a display that is not there
                self.window = False
        data = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        atomic_write(self.folder / self._name(row["path"]), lambda path: path.write_bytes(data))

    def _name(self, path: str) -> str:
        """The file's name with its suffix (``a.jpg`` and ``a.png`` differ), numbered if taken."""
        base, number = Path(path).name, 1
        name = f"{base}.png"
        while name in self._written:
            number += 1
            name = f"{base}-{number}.png"
        self._written.add(name)
        return name
