"""What a service takes from strangers: limits, and image bytes that are what they say.

Everything is refused before it costs much: a body while it arrives, a picture of too many pixels
or too many scans before it is decoded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from shared_core.datasets import DecodeError
from shared_core.datasets.reading.decode import EncodedImage
from shared_core.datasets.reading.image_headers import Pixels, jpeg_header, kind_of, tiff_tags
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
    max_scans: int = 500  # of a JPEG; an encoder writes 1 to about 12
    max_requests: int = 64  # at the same time
    read_seconds: float = 30.0  # for a request to arrive
    answer_seconds: float = 60.0  # for its answer, once it has arrived

    @property
    def max_scanned(self) -> int:
        """Pixels times scans of a JPEG: every scan goes over the whole picture again."""
        return 20 * self.max_pixels


def stated_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels that an image file's header states, without decoding.

    Raises:
        ValueError: an unknown kind, a header that is cut off, or one that states two sizes.
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
            _refuse_two_sizes(data)
            tags = tiff_tags(data)
            return tags[257][0], tags[256][0]
        if kind == "webp":
            return _webp_size(data)
    except (struct.error, IndexError, KeyError):
        raise ValueError(f"the {kind.upper()} header is cut off") from None
    raise ValueError("not a JPEG, PNG, BMP, TIFF or WebP file")


def _refuse_two_sizes(data: bytes) -> None:
    """A TIFF directory that names width or height twice: readers differ in which one they take."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    ends = min(start + 2 + 12 * count, len(data) - 1)
    tags = [struct.unpack_from(order + "H", data, at)[0] for at in range(start + 2, ends, 12)]
    if tags.count(256) > 1 or tags.count(257) > 1:
        raise ValueError("the TIFF header states its size twice")


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
    if kind == "unknown":
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
    # Within the coded data of a JPEG 0xFF is always followed by 0 or a restart: this is a marker.
    scans = data.count(b"\xff\xda") if kind == "jpeg" else 1
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
