"""Decoding: the bytes of an image file become RGB uint8 ``(H, W, 3)``, upright.

JPEG goes through simplejpeg (libjpeg-turbo), PNG and WebP through OpenCV, the rest through Pillow.
Grey becomes three equal channels, palettes their colours, CMYK plain ``(255-C)(255-K)/255``; 16
bits are scaled to 8 (65535 becomes 255, rounded); what a file declares as alpha is composited on
white, what it does not is left out; EXIF orientation is honoured. Of an animation the first picture
counts. Sizes are held to ``image_headers.MAX_PIXELS`` before anything is allocated.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import simplejpeg

from shared_core.datasets.errors import DecodeError, UnsupportedImageError
from shared_core.datasets.reading.image_headers import (
    MAX_PIXELS,
    MAX_SCANNED,
    MAX_SCANS,
    JpegHeader,
    Pixels,
    check_pixels,
    check_whole,
    fewest_bytes,
    jpeg_header,
    jpeg_scans,
    kind_of,
    orientation_of,
    png_chunks,
    stated_size,
    turn,
)
from shared_core.datasets.reading.samples import (
    Decoded,
    Remark,
    Samples,
    dim,
    through_opencv,
    to_rgb,
)
from shared_core.datasets.reading.through_pillow import through_pillow

DCT_FACTORS = (8, 4, 2)  # the reductions that libjpeg-turbo has fast code for
MAX_BYTES = 1 << 30  # of a file


def decode(
    data: bytes | str | Path,
    *,
    min_size: tuple[int, int] | None = None,
    name: str | None = None,
    scale_max: int | None = None,
) -> Pixels:
    """Decode an image file to RGB.

    Args:
        data: the file's bytes, or its path.
        min_size: ``(height, width)`` in pixels. When given, a JPEG may come out reduced by
            ``dct_factor(size, min_size)``, never smaller than asked; other formats come out whole.
        name: what to call the file in errors; the path by default.
        scale_max: the sample that is white in an image of 16 bits (4095 for a camera of 12 bits);
            by default the largest that the file's depth holds.

    Returns:
        uint8 ``(H, W, 3)``, contiguous; ``H = ceil(height / factor)``.

    Raises:
        FileNotFoundError: no such file.
        DecodeError: empty, truncated, not an image, no file at all.
        UnsupportedImageError: of a kind that is not read, or larger than ``MAX_PIXELS``.
    """
    if not isinstance(data, bytes):
        name = str(data) if name is None else name
        data = read_bytes(data)
    image = EncodedImage(data, name="image data" if name is None else name, scale_max=scale_max)
    factor = 1 if min_size is None else dct_factor((image.height, image.width), min_size)
    return image.pixels(factor=factor if image.reducible else 1)


def dct_factor(size: tuple[int, int], min_size: tuple[int, int]) -> int:
    """The largest of 8, 4, 2, 1 by which ``size`` can be divided and still hold ``min_size``."""
    for factor in DCT_FACTORS:
        if -(-size[0] // factor) >= min_size[0] and -(-size[1] // factor) >= min_size[1]:
            return factor
    return 1


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file in one system call or two (twice as fast as ``Path.read_bytes``).

    Raises:
        FileNotFoundError: no such file.
        DecodeError: a folder, a pipe, a device, or more than ``MAX_BYTES``.
    """
    # Without O_NONBLOCK the opening of a named pipe would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise FileNotFoundError(f"image file {os.fspath(path)} does not exist") from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            what = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, a socket or a device"
            raise DecodeError(f"{os.fspath(path)}: {what}, expected an image file")
        size = state.st_size
        if size > MAX_BYTES:
            raise UnsupportedImageError(
                f"{os.fspath(path)}: {size} bytes, expected an image of at most {MAX_BYTES}"
            )
        data = os.read(handle, size)
        while len(data) < size and (more := os.read(handle, size - len(data))):
            data += more
        return data
    finally:
        os.close(handle)


class EncodedImage:
    """An image file whose size is known and whose pixels are decoded on demand.

    ``height`` and ``width`` (pixels) are those of the upright image. ``reducible`` says that
    ``pixels`` honours ``factor`` and ``rows``; other images always come out whole. ``remarks`` are
    what a user should know of an image that can be read.
    """

    __slots__ = (
        "_data", "_header", "_whole", "deep", "height", "name", "reducible", "remarks", "width"
    )  # fmt: skip

    def __init__(self, data: bytes, *, name: str, scale_max: int | None = None) -> None:
        self._data = data
        self.name = name
        self.remarks: tuple[Remark, ...] = ()
        self.deep = False
        self._header: JpegHeader | None = None
        self._whole: Pixels | None = None
        if not data:
            raise DecodeError(f"{name}: empty file, expected an image")
        kind = kind_of(data)
        _check_cost(data, kind, name)
        if kind == "jpeg":
            header = jpeg_header(data)
            self._header = header
            self.height, self.width = header.height, header.width
            if header.orientation >= 5:
                self.height, self.width = self.width, self.height
            self.reducible = header.orientation == 1 and header.components in (1, 3)
        else:
            self._whole, self.remarks, self.deep = _decode_other(data, kind, name, scale_max)
            self.height, self.width = self._whole.shape[:2]
            self.reducible = False

    def pixels(self, *, factor: int = 1, rows: int | None = None) -> Pixels:
        """Decode.

        Args:
            factor: reduce both sides by 1, 2, 4 or 8 within the inverse DCT.
            rows: how many rows of the (reduced) image are needed, from the top; the result may
                have fewer rows than the image, never fewer than this. The rows that are there
                equal those of a whole decode.

        Raises:
            DecodeError: truncated or damaged data.
        """
        if self._whole is not None:
            return self._whole
        header = self._header
        if header is None:
            raise DecodeError(f"{self.name}: nothing to decode")
        if not self.reducible:
            return turn(_decode_jpeg(self._data, header, self.name, 1), header.orientation)
        if rows is not None and header.frame in (0xC0, 0xC1):
            # A baseline file whose header says fewer lines is still a valid file: libjpeg stops
            # there, and the entropy decoding below the crop is saved. The margin keeps the rows
            # that smooth chroma upsampling looks at.
            lines = (rows + 4) * factor
            if lines + 16 <= header.height:  # at least a row of blocks
                at = header.height_at
                data = self._data[:at] + lines.to_bytes(2, "big") + self._data[at + 2 :]
                short = header._replace(height=lines)
                return _decode_jpeg(data, short, self.name, factor)
        return _decode_jpeg(self._data, header, self.name, factor)


def _check_cost(data: bytes, kind: str, name: str) -> None:
    """Refuse by the header alone what would cost too much, or cannot be whole."""
    try:
        size = stated_size(data)
        if size is None:
            return
        height, width = size
        if height * width <= MAX_PIXELS and fewest_bytes(data, kind, size) > len(data):
            raise ValueError(f"{len(data)} bytes cannot hold the {width} x {height} pixels stated")
    except (ValueError, IndexError) as error:
        raise DecodeError(f"{name}: {_told(kind)}{error}") from None
    check_pixels(height, width, name)
    scans = jpeg_scans(data) if kind == "jpeg" else 1
    if scans > MAX_SCANS or scans * height * width > MAX_SCANNED:
        raise UnsupportedImageError(
            f"{name}: a JPEG of {scans} scans of {width} x {height} pixels, expected at most "
            f"{min(MAX_SCANS, MAX_SCANNED // (height * width))}"
        )


def _told(kind: str) -> str:
    return "" if kind == "unknown" else f"truncated or damaged {kind.upper()}: "


def _decode_jpeg(data: bytes, header: JpegHeader, name: str, factor: int) -> Pixels:
    height, width = -(-header.height // factor), -(-header.width // factor)
    # With a buffer of our own the pixels are there even when a harmless warning is raised.
    out = np.empty((height, width, 3), dtype=np.uint8)
    limits = (height, width, factor) if factor > 1 else (0, 0, 1)
    try:
        simplejpeg.decode_jpeg(
            data, "RGB", False, False, limits[0], limits[1], limits[2], out, True
        )
    except ValueError as error:
        # Left-over bytes are expected below a crop, and some cameras write a few.
        if "extraneous bytes" not in str(error):
            raise DecodeError(f"{name}: truncated or damaged JPEG: {error}") from None
    return out


def _decode_other(
    data: bytes, kind: str, name: str, scale_max: int | None
) -> tuple[Pixels, tuple[Remark, ...], bool]:
    remarks: tuple[Remark, ...] = ()
    try:
        check_whole(data, kind)  # first: OpenCV would write its complaints to stderr
        if kind in ("png", "webp"):
            samples = through_opencv(data)
            samples = _grey_key_to_alpha(samples, data, kind)
            top = int(np.iinfo(samples.dtype).max)
            alpha = "straight" if samples.ndim == 3 and samples.shape[2] == 4 else None
            decoded = Decoded(samples, bgr=True, alpha=alpha, top=top)
        else:
            decoded, remarks = through_pillow(data, kind, name)
        deep = decoded.samples.dtype == np.uint16
        if deep and scale_max is not None:
            decoded = decoded._replace(top=scale_max)
        elif deep:
            remarks = (*remarks, *dim(decoded))
        return turn(to_rgb(decoded), orientation_of(data, kind)), remarks, deep
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything in Pillow
        text = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{name}: truncated or damaged {kind.upper()}: {text}") from None


def _grey_key_to_alpha(image: Samples, data: bytes, kind: str) -> Samples:
    """OpenCV ignores the transparent level that a grey PNG may name; make it an alpha channel."""
    if kind != "png" or image.ndim != 2:
        return image
    for chunk, start, length in png_chunks(data):
        if chunk == b"tRNS" and length == 2:
            bits = data[24]  # bit depth in the header chunk
            key = int.from_bytes(data[start : start + 2], "big")
            top = int(np.iinfo(image.dtype).max)
            key = key * top // ((1 << bits) - 1)
            alpha = np.where(image == key, 0, top).astype(image.dtype)
            return np.dstack([image, image, image, alpha])
    return image
