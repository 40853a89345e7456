"""What a service takes from strangers: limits, and image bytes that are what they say.

Everything is refused before it costs much: a body while it arrives, a picture of too many pixels
or too many scans before it is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared_core.datasets import DecodeError
from shared_core.datasets.reading.decode import EncodedImage
from shared_core.datasets.reading.image_headers import (
    MAX_SCANS,
    Pixels,
    jpeg_scans,
    kind_of,
    stated_size,
)
from shared_core.datasets.reading.loader import write_view
from shared_core.datasets.views.augment import View, view_rng


class UploadError(ValueError):
    """A request that is refused: HTTP ``status``, a short ``code``, one line."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """How much one request may bring."""

    max_bytes: int = 10 * 2**20  # of a request
    max_pixels: int = 40_000_000  # of an image, before it is decoded
    max_files: int = 16  # of a request
    max_scans: int = MAX_SCANS  # of a JPEG; an encoder writes 1 to about 12
    max_requests: int = 64  # at the same time
    read_seconds: float = 30.0  # for a request to arrive
    answer_seconds: float = 60.0  # for its answer, once it has arrived

    @property
    def max_scanned(self) -> int:
        """Pixels times scans of a JPEG: every scan goes over the whole picture again."""
        return 20 * self.max_pixels


def check_upload(data: bytes, *, name: str, limits: Limits) -> None:
    """Refuse what costs too much to decode, by its header alone.

    Args:
        name: what to call the file in errors.

    Raises:
        UploadError: 400 empty, 413 too many pixels or scans, 415 no image kind, 422 damaged.
    """
    if not data:
        raise UploadError(400, "empty", f"{name}: empty file, expected an image")
    kind = kind_of(data)
    try:
        size = None if kind == "unknown" else stated_size(data)  # None of an AVIF, too
        if size is None:
            what = "not a JPEG, PNG, BMP, TIFF, WebP or GIF file"
            raise UploadError(415, "not_an_image", f"{name}: {what}")
        height, width = size
    except UploadError:
        raise
    except ValueError as error:
        raise UploadError(422, "damaged", f"{name}: {error}") from None
    if height * width > limits.max_pixels:
        raise UploadError(
            413,
            "too_many_pixels",
            f"{name}: {width} x {height} pixels, expected at most {limits.max_pixels}",
        )
    scans = jpeg_scans(data) if kind == "jpeg" else 1
    if scans > limits.max_scans or scans * height * width > limits.max_scanned:
        raise UploadError(
            413,
            "too_many_scans",
            f"{name}: a JPEG of {scans} scans at {width} x {height} pixels, expected at most "
            f"{min(limits.max_scans, limits.max_scanned // max(1, height * width))}",
        )


def view_of_upload(data: bytes, *, name: str, view: View) -> Pixels:
    """Decode a checked file as evaluation does: uint8 ``(H, W, 3)`` of the view's size.

    Raises:
        UploadError: 422 damaged.
    """
    out = np.empty((*view.size, 3), np.uint8)
    try:
        write_view(EncodedImage(data, name=name), view, view_rng(0, 0, 0), out)
    except DecodeError as error:
        raise UploadError(422, "damaged", str(error)) from None
    return out
