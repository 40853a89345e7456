"""What a service takes from strangers: limits, and image bytes that are what they say.

Everything is refused before it costs much: a body while it arrives, a picture of too many pixels
before it is decoded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from shared_core.datasets import DecodeError, view_rng
from shared_core.datasets.reading.decode import EncodedImage
from shared_core.datasets.reading.image_headers import jpeg_header, kind_of, tiff_tags
from shared_core.datasets.reading.loader import write_view
from shared_core.datasets.views.augment import View

IMAGE_TYPES = frozenset(f"image/{kind}" for kind in ("jpeg", "png", "bmp", "tiff", "webp"))


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
    max_requests: int = 64  # at the same time
    read_seconds: float = 30.0  # for a request to arrive


def stated_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels that an image file's header states, without decoding.

    Raises:
        ValueError: an unknown kind, or a header that is cut off.
    """
    kind = kind_of(data)
    try:
        if kind == "jpeg":
            header = jpeg_header(data)
            return header.height, header.width
        if kind == "png":
            width, height = struct.unpack_from(">II", data, 16)
            return height, width
        if kind == "bmp":
            form = "<HH" if data[14:18] == b"\x0c\0\0\0" else "<ii"  # the oldest has 16-bit sizes
            width, height = struct.unpack_from(form, data, 18)
            return abs(height), abs(width)
        if kind == "tiff":
            tags = tiff_tags(data)
            return tags[257][0], tags[256][0]
        if kind == "webp":
            return _webp_size(data)
    except (struct.error, IndexError, KeyError):
        raise ValueError(f"the {kind.upper()} header is cut off") from None
    raise ValueError("not a JPEG, PNG, BMP, TIFF or WebP file")


def _webp_size(data: bytes) -> tuple[int, int]:
    form = data[12:16]
    if form == b"VP8X":  # 24 bits each, less one
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        if len(data) < 30:
            raise IndexError
    elif form == b"VP8L":  # 14 bits each, less one, packed
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (n & 0x3FFF for n in struct.unpack_from("<HH", data, 26))
    return height, width


def view_of_upload(data: bytes, *, name: str, view: View, limits: Limits) -> np.ndarray:
    """Decode an uploaded file as evaluation does: uint8 ``(H, W, 3)`` of the view's size.

    Args:
        name: what to call the file in errors.

    Raises:
        UploadError: 400 empty, 413 too many pixels, 415 no image kind, 422 damaged.
    """
    if not data:
        raise UploadError(400, "empty", f"{name}: empty file, expected an image")
    if kind_of(data) == "unknown":
        raise UploadError(415, "not_an_image", f"{name}: not a JPEG, PNG, BMP, TIFF or WebP file")
    try:
        height, width = stated_size(data)
    except ValueError as error:
        raise UploadError(422, "damaged", f"{name}: {error}") from None
    if height * width > limits.max_pixels:
        raise UploadError(
            413,
            "too_many_pixels",
            f"{name}: {width} x {height} pixels, expected at most {limits.max_pixels}",
        )
    out = np.empty((*view.size, 3), np.uint8)
    try:
        write_view(EncodedImage(data, name=name), view, view_rng(0, 0, 0), out)
    except DecodeError as error:
        raise UploadError(422, "damaged", str(error)) from None
    return out
