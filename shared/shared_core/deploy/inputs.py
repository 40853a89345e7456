"""Where the images of a prediction come from: files, lines of paths, the frames of a video."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core import datasets
from shared_core.datasets.finding.scan import list_images
from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.reading.loader import write_view
from shared_core.datasets.views.augment import View, view_rng
from shared_core.texts import clean_lines

VIDEO_ENDINGS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})


@dataclass(frozen=True)
class Source:
    """One image that was asked for.

    Attributes:
        path: the file, the video, or ``camera N``.
        frame: of a video or a camera, counted from 0.
        error: why there is no image, on one line; None where there is one.
        picture: a frame's own pixels, uint8 RGB ``(h, w, 3)``; None where ``path`` is the picture.
        rate: frames a second of the video, where it says so.
        between: a frame that is only shown, with the answer of the one before.
    """

    path: str
    frame: int | None = None
    error: str | None = None
    picture: Pixels | None = None
    rate: float | None = None
    between: bool = False


@dataclass(frozen=True)
class Loaded:
    """Sources in their order, and the views of those to classify: uint8 ``(n, H, W, 3)``."""

    sources: list[Source]
    images: Pixels


def one_line(path: str | Path, reason: object) -> str:
    """The reason on one line, without the path at its beginning."""
    return " ".join(str(reason).removeprefix(f"{path}: ").split())


def is_video_name(path: str | Path) -> bool:
    """Whether a named file is taken for a video, by its ending."""
    return os.path.splitext(path)[1].lower() in VIDEO_ENDINGS


def load_files(
    files: Sequence[Path], view: View, *, batch_size: int, workers: int
) -> Iterator[Loaded]:
    """Batches of image files in their order; what cannot be read is among the sources."""
    images = datasets.ImageSet(list(files), [0] * len(files))
    loader = datasets.BatchLoader(
        images, view=view, batch_size=batch_size, threads=workers, on_error="skip"
    )
    told = after = 0

    def sources(up_to: int) -> list[Source]:
        nonlocal told, after
        bad = {one.index: one_line(one.name, one.reason) for one in loader.skipped[told:]}
        bad = {index: reason for index, reason in bad.items() if index < up_to}
        told += len(bad)
        found = [Source(str(files[n]), error=bad.get(n)) for n in range(after, up_to)]
        after = up_to
        return found

    for batch in loader:
        yield Loaded(sources(int(batch.indices[-1]) + 1), batch.images)
    if after < len(files):
        yield Loaded(sources(len(files)), no_images(view))


def load_lines(
    lines: Iterable[str | bytes], view: View, *, batch_size: int, workers: int
) -> Iterator[Loaded]:
    """Images whose paths come one a line; those that have arrived are answered together.

    Nothing waits for a batch to be full: a program that writes one path and waits for its answer
    gets it.
    """
    for group in _arrived(lines, batch_size):
        found = list_images(group)
        bad = [Source(str(path), error=reason) for path, reason in found.bad]
        if bad:
            yield Loaded(bad, no_images(view))
        threads = workers if len(found.files) > 1 else 0
        yield from load_files(found.files, view, batch_size=batch_size, workers=threads)


def _arrived(lines: Iterable[str | bytes], most: int) -> Iterator[list[Path]]:
    """Paths that are there, at least one and at most ``most`` at a time."""
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for line in clean_lines(lines):
                waiting.put(line)
        finally:
            waiting.put(None)

    threading.Thread(target=read, name="lines", daemon=True).start()
    line = waiting.get()
    while line is not None:
        group: list[Path] = []
        while line is not None:
            if line.strip():
                group.append(_path(line))
            if len(group) == most or (group and waiting.empty()):
                break
            line = waiting.get()
        if group:
            yield group
        if line is not None:
            line = waiting.get()


def _path(line: str) -> Path:
    """The path that a line means: as it stands, else with the slashes of the other system."""
    path = Path(line)
    if "\\" in line and os.sep == "/" and not path.exists():
        turned = Path(line.replace("\\", "/"))
        return turned if turned.exists() else path
    return path


def load_video(
    source: str | Path | int,
    view: View,
    *,
    batch_size: int,
    every: int = 1,
    frames: int = 0,
    between: bool = False,
) -> Iterator[Loaded]:
    """Each ``every``-th frame of a video file, or of camera number ``source``.

    Args:
        frames: stop after so many read; 0 reads to the end.
        between: also give the frames that are not classified, to be shown.

    Raises:
        FileNotFoundError: no such file.
        OSError: OpenCV cannot open it, or it gives no frame.
    """
    name = f"camera {source}" if isinstance(source, int) else str(source)
    most = 1 if between or isinstance(source, int) else batch_size
    with opened_video(source) as capture:
        rate = capture.get(cv2.CAP_PROP_FPS) or None
        batch: list[Source] = []
        number = 0
        while not frames or number < frames:
            there, frame = capture.read()
            if not there:
                break
            passed = number % every != 0
            if between or not passed:
                picture = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                batch.append(Source(name, number, None, picture, rate, passed))
            number += 1
            if len(batch) == most:
                yield _views(batch, view)
                batch = []
        if not number:
            raise OSError(f"{name} gives no frame")
        if batch:
            yield _views(batch, view)


@contextmanager
def opened_video(source: str | Path | int) -> Iterator[Any]:
    """An ``cv2.VideoCapture`` that is open; what goes wrong is said in one line, by us.

    Raises:
        FileNotFoundError: no such file.
        OSError: OpenCV cannot open it.
    """
    if not isinstance(source, int) and not Path(source).is_file():
        raise FileNotFoundError(f"{source} does not exist, expected a video")
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        try:
            if not capture.isOpened():
                what = f"camera {source}" if isinstance(source, int) else source
                raise OSError(f"{what} cannot be opened, expected a video that OpenCV reads")
            yield capture
        finally:
            capture.release()
    finally:
        cv2.utils.logging.setLogLevel(before)


def _views(batch: list[Source], view: View) -> Loaded:
    pictures = [one.picture for one in batch if one.picture is not None and not one.between]
    images = np.empty((len(pictures), *view.size, 3), np.uint8)
    for picture, out in zip(pictures, images, strict=True):
        write_view(picture, view, view_rng(0, 0, 0), out)
    return Loaded(batch, images)


def no_images(view: View, count: int = 0) -> Pixels:
    """Views of no image, or of ``count`` black ones."""
    return np.zeros((count, *view.size, 3), np.uint8)
