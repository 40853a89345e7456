"""Decoding: the bytes of an image file become RGB uint8 ``(H, W, 3)``, upright.

JPEG goes through simplejpeg (libjpeg-turbo), PNG, BMP, TIFF and WebP through OpenCV. Grey becomes
three equal channels, palettes their colours, CMYK plain ``(255-C)(255-K)/255``; 16 bits are scaled
to 8 (65535 becomes 255, rounded); alpha is composited on white; EXIF orientation is honoured.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from shared_core.datasets.errors import DecodeError
from shared_core.datasets.reading.image_headers import (
    JpegHeader,
    Pixels,
    check_whole,
    jpeg_header,
    kind_of,
    orientation_of,
    png_chunks,
    tiff_tags,
    turn,
)

Samples = npt.NDArray[np.unsignedinteger]
DCT_FACTORS = (8, 4, 2)  # the reductions that libjpeg-turbo has fast code for


def decode(
    data: bytes | str | Path,
    *,
    min_size: tuple[int, int] | None = None,
    name: str | None = None,
) -> Pixels:
    """Decode an image file to RGB.

    Args:
        data: the file's bytes, or its path.
        min_size: ``(height, width)`` in pixels. When given, a JPEG may come out reduced by
            ``dct_factor(size, min_size)``, never smaller than asked; other formats come out whole.
        name: what to call the file in errors; the path by default.

    Returns:
        uint8 ``(H, W, 3)``, contiguous; ``H = ceil(height / factor)``.

    Raises:
        FileNotFoundError: no such file.
        DecodeError: empty, truncated, not an image, or of an unsupported kind.
    """
    if not isinstance(data, bytes):
        name = str(data) if name is None else name
        data = read_bytes(data)
    image = EncodedImage(data, name="image data" if name is None else name)
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
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"image file {os.fspath(path)} does not exist") from None
    try:
        size = os.fstat(handle).st_size
        data = os.read(handle, size)
        while len(data) < size and (more := os.read(handle, size - len(data))):
            data += more
        return data
    finally:
        os.close(handle)


class EncodedImage:
    """An image file whose size is known and whose pixels are decoded on demand.

    ``height`` and ``width`` (pixels) are those of the upright image. ``reducible`` says that
    ``pixels`` honours ``factor`` and ``rows``; other images always come out whole.
    """

    __slots__ = ("_data", "_header", "_whole", "height", "name", "reducible", "width")

    def __init__(self, data: bytes, *, name: str) -> None:
        self._data = data
        self.name = name
        self._header: JpegHeader | None = None
        self._whole: Pixels | None = None
        if not data:
            raise DecodeError(f"{name}: empty file, expected an image")
        kind = kind_of(data)
        if kind == "jpeg":
            try:
                header = jpeg_header(data)
            except ValueError as error:
                raise DecodeError(f"{name}: truncated or damaged JPEG: {error}") from None
            self._header = header
            self.height, self.width = header.height, header.width
            if header.orientation >= 5:
                self.height, self.width = self.width, self.height
            self.reducible = header.orientation == 1 and header.components in (1, 3)
        else:
            self._whole = _decode_other(data, kind, name)
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


def _decode_jpeg(data: bytes, header: JpegHeader, name: str, factor: int) -> Pixels:
    if header.height == 0 or header.width == 0:
        raise DecodeError(f"{name}: JPEG of {header.height} x {header.width} pixels")
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


def _decode_other(data: bytes, kind: str, name: str) -> Pixels:
    if kind == "unknown":
        raise DecodeError(f"{name}: not a JPEG, PNG, BMP, TIFF or WebP file")
    try:
        check_whole(data, kind)  # first: OpenCV would write its complaints to stderr
        _refuse_unsupported(data, kind)
        decoded: Any = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise ValueError("OpenCV cannot decode it")
        image = _to_rgb(_grey_key_to_alpha(decoded, data, kind), premultiplied=kind == "tiff")
        return turn(image, orientation_of(data, kind))
    except (ValueError, IndexError, cv2.error) as error:
        text = " ".join(str(error).split())
        raise DecodeError(f"{name}: truncated or damaged {kind.upper()}: {text}") from None


def _refuse_unsupported(data: bytes, kind: str) -> None:
    if kind == "tiff":
        tags = tiff_tags(data)
        photometric, samples = tags.get(262, (2,))[0], tags.get(277, (1,))[0]
        if photometric in (0, 1) and samples > 1:
            raise ValueError(f"grey TIFF with {samples} samples a pixel is not supported")
        if photometric in (8, 9, 10):
            raise ValueError("TIFF in CIE L*a*b* is not supported")


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


def _to_rgb(image: Samples, *, premultiplied: bool) -> Pixels:
    """Grey, BGR or BGRA of 8 or 16 bits to RGB of 8 bits, alpha composited on white."""
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{image.dtype} samples are not supported, expected 8 or 16 bits")
    if image.ndim == 2:
        image = np.dstack([image, image, image])
    top = int(np.iinfo(image.dtype).max)
    if image.shape[2] == 4:
        # Unsigned 32 bits hold it: color * alpha + top * (top - alpha) + top // 2 < 2**32.
        color, alpha = image[..., :3].astype(np.uint32), image[..., 3:].astype(np.uint32)
        if premultiplied and top == 255:  # libtiff hands out 8-bit colour times alpha
            image = np.minimum(color + (top - alpha), top)
        else:
            color *= alpha
            color += top * (top - alpha) + top // 2
            image = color // top
    if top != 255:
        image = (image.astype(np.uint32) + 128) // 257  # 65535 / 257 = 255, rounded
    return np.ascontiguousarray(image[..., ::-1], dtype=np.uint8)
