"""Each image with its answer: in a window, as a picture on disk, a video as ``labelled.mp4``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets.reading.image_headers import Pixels

WIDTH = 480  # pixels of a picture
LINE = 30  # pixels of a line of text
DEFAULT_FOLDER = Path("inference_results")
Ranked = Sequence[tuple[str, float]]  # class names and probabilities, best first


def has_display() -> bool:
    """Whether a window can be opened: always on Windows and macOS, else where a server is named."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def annotate(image: Pixels, ranked: Ranked) -> Pixels:
    """The image with a panel below it: a line and a bar for each class, best first.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        ranked: names and probabilities in [0, 1].

    Returns:
        uint8 RGB ``(H', 480, 3)``.
    """
    height = max(1, round(image.shape[0] * WIDTH / image.shape[1]))
    method = cv2.INTER_AREA if image.shape[1] > WIDTH else cv2.INTER_LINEAR
    scaled = cv2.resize(image, (WIDTH, height), interpolation=method)
    panel = np.full((LINE * len(ranked) + 10, WIDTH, 3), 255, np.uint8)
    for n, (name, probability) in enumerate(ranked):
        y = 5 + n * LINE
        color = (46, 125, 79) if n == 0 else (160, 185, 170)
        length = round(min(max(probability, 0.0), 1.0) * (WIDTH - 20))
        cv2.rectangle(panel, (10, y + 22), (10 + length, y + 27), color, thickness=-1)
        _text(panel, name, (10, y + 17))
        _text(panel, f"{probability:.4f}", (WIDTH - 80, y + 17))
    return np.concatenate([scaled, panel]).astype(np.uint8)


def _text(panel: Pixels, text: str, at: tuple[int, int]) -> None:
    """Draw a line; OpenCV before 5 has Latin letters only, the rest comes out as code points."""
    ink = (29, 43, 36)
    write: Any = cv2.putText
    if hasattr(cv2, "FontFace"):
        write(panel, text, at, ink, cv2.FontFace("uni"), 16)
        return
    plain = text.encode("ascii", "backslashreplace").decode("ascii")
    write(panel, plain, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, ink, 1, cv2.LINE_AA)


class Shower:
    """Shows answers one after the other.

    Args:
        folder: where pictures go; None means ``inference_results``.
        window: open windows instead; where OpenCV cannot, pictures are written all the same.
    """

    def __init__(self, folder: Path | None, *, window: bool) -> None:
        self.folder = DEFAULT_FOLDER if folder is None else folder
        self.window = window
        self.written: set[str] = set()
        self._video: Any = None

    def __enter__(self) -> Shower:
        return self

    def __exit__(self, *_: object) -> None:
        if self._video is not None:
            self._video.release()

    def show(self, image: Pixels, ranked: Ranked, *, name: str, rate: float | None = None) -> bool:
        """Show, or write ``<name>.png``; a frame goes to ``labelled.mp4``.

        Args:
            image: uint8 RGB ``(H, W, 3)``.
            name: the image's file name.
            rate: frames a second; None: a single image.

        Returns:
            Whether the user wants no more (q in the window).

        Raises:
            OSError: it cannot be written.
        """
        picture = annotate(image, ranked)
        if self.window:
            try:
                cv2.imshow("smallvision", picture[..., ::-1])
                return cv2.waitKey(0 if rate is None else 1) & 0xFF == ord("q")
            except cv2.error:  # a build without windows, or a display that is not there
                self.window = False
        if rate is not None:
            self._frame(picture, rate)
            return False
        done, data = cv2.imencode(".png", picture[..., ::-1])
        if not done:
            raise OSError(f"{name}: the picture could not be encoded")
        content = data.tobytes()
        atomic_write(self.folder / self._free(name), lambda path: path.write_bytes(content))
        return False

    def _frame(self, picture: Pixels, rate: float) -> None:
        even = picture[: picture.shape[0] // 2 * 2]  # MPEG-4 takes even sides only
        if self._video is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "labelled.mp4"
            size = (even.shape[1], even.shape[0])
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._video = cv2.VideoWriter(str(path), code, rate, size)
            if not self._video.isOpened():
                raise OSError(f"{path}: this OpenCV cannot write MPEG-4 video")
            self.written.add(path.name)
        self._video.write(np.ascontiguousarray(even[..., ::-1]))

    def _free(self, file: str) -> str:
        """The file's name with its ending (``a.jpg`` and ``a.png`` differ), numbered if taken."""
        number, name = 1, f"{file}.png"
        while name in self.written:
            number += 1
            name = f"{file}-{number}.png"
        self.written.add(name)
        return name
