"""What the first bytes of an image file say: its kind, its size, and how EXIF wants it turned."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4}
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
# Size, samples, where strips and tiles lie, and orientation: all that is ever asked for.
_TIFF_TAGS = frozenset({256, 257, 262, 273, 277, 279, 324, 325, _ORIENTATION_TAG})
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class JpegHeader(NamedTuple):
    """The frame of a JPEG file, as stored (before EXIF turns it).

    ``frame`` is the SOF marker's second byte (0xC0 baseline, 0xC2 progressive), ``height_at`` the
    offset of the two bytes that hold the height.
    """

    height: int  # pixels
    width: int  # pixels
    components: int
    frame: int
    height_at: int
    orientation: int  # EXIF, 1 to 8


def kind_of(data: bytes) -> str:
    """Name the format by its signature: jpeg, png, bmp, tiff, webp or unknown."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == _PNG_SIGNATURE:
        return "png"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM":
        return "bmp"
    return "unknown"


def jpeg_header(data: bytes) -> JpegHeader:
    """Walk the segments of a JPEG file up to its frame header.

    Raises:
        ValueError: the file ends, or leaves the format, before a frame header.
    """
    position, orientation, end = 2, 1, len(data)
    while position + 4 <= end:
        if data[position] != 0xFF:
            raise ValueError(f"no JPEG marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # padding before a marker is allowed
            position += 1
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if position + 10 > end:
                break
            return JpegHeader(
                (data[position + 5] << 8) | data[position + 6],
                (data[position + 7] << 8) | data[position + 8],
                data[position + 9],
                marker,
                position + 5,
                orientation,
            )
        if marker == 0xE1 and data[position + 4 : position + 10] == _EXIF:
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        if marker in (0xD9, 0xDA):
            raise ValueError("image data without a frame header")
        position += 2 + length
    raise ValueError("the file ends before the frame header")


def tiff_tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Read the tags in ``_TIFF_TAGS`` of the first directory of a TIFF file or EXIF block.

    Entries that do not fit into ``data`` are left out. Of a tag that stands twice the first counts,
    as for libtiff. A directory of thousands of tags that all claim the whole file costs nothing.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return {}
    tags: dict[int, tuple[int, ...]] = {}
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return {}
    (count,) = struct.unpack_from(order + "H", data, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        size = _TIFF_TYPE_BYTES.get(kind, 0)
        if tag not in _TIFF_TAGS or tag in tags or size == 0 or kind in (2, 7) or number == 0:
            continue
        where = entry + 8
        if size * number > 4:
            (where,) = struct.unpack_from(order + "I", data, where)
        if where + size * number <= len(data):
            code = {1: "B", 2: "H", 4: "I"}[size]
            tags[tag] = struct.unpack_from(f"{order}{number}{code}", data, where)
    return tags


def orientation_of(data: bytes, kind: str) -> int:
    """The EXIF orientation (1 to 8) of a PNG or WebP file; 1 where it says nothing.

    TIFF is left out: OpenCV turns it while decoding, whatever it is asked.
    """
    if kind == "png":
        for name, start, length in png_chunks(data):
            if name == b"eXIf":
                return _exif_orientation(data[start : start + length])
    if kind == "webp":
        position = 12
        while position + 8 <= len(data):
            (length,) = struct.unpack_from("<I", data, position + 4)
            if data[position : position + 4] == b"EXIF":
                block = data[position + 8 : position + 8 + length]
                return _exif_orientation(block[6:] if block[:6] == _EXIF else block)
            position += 8 + length + length % 2
    return 1


def png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """The chunks of a PNG file as (name, offset of the content, length), up to IEND.

    Raises:
        ValueError: the file ends before IEND, or a chunk's checksum is wrong.
    """
    chunks: list[tuple[bytes, int, int]] = []
    position, end = 8, len(data)
    view = memoryview(data)
    while position + 12 <= end:
        (length,) = struct.unpack_from(">I", data, position)
        stop = position + 8 + length
        if stop + 4 > end:
            break
        name = data[position + 4 : position + 8]
        (expected,) = struct.unpack_from(">I", data, stop)
        if zlib.crc32(view[position + 4 : stop]) != expected:
            raise ValueError(f"wrong checksum in the PNG chunk {name.decode('latin-1')!r}")
        chunks.append((name, position + 8, length))
        if name == b"IEND":
            return chunks
        position = stop + 4
    raise ValueError("the file ends before the PNG end chunk")


def check_whole(data: bytes, kind: str) -> None:
    """Refuse a file that is shorter than its own header promises.

    Raises:
        ValueError: with what is missing.
    """
    if kind == "png":
        png_chunks(data)
    elif kind == "webp":
        (promised,) = struct.unpack_from("<I", data, 4)
        if promised + 8 > len(data):
            raise ValueError(f"{len(data)} bytes where the header promises {promised + 8}")
    elif kind == "bmp":
        if len(data) < 30:
            raise ValueError("the file ends within the BMP header")
        (start,) = struct.unpack_from("<I", data, 10)
        width, height, _planes, bits, packing = struct.unpack_from("<iiHHI", data, 18)
        need = start + (abs(width) * bits + 31) // 32 * 4 * abs(height)
        if packing in (0, 3) and need > len(data):  # uncompressed rows of known length
            raise ValueError(f"{len(data)} bytes where the header promises {need}")
    elif kind == "tiff":
        tags = tiff_tags(data)
        for at, size in ((273, 279), (324, 325)):  # strips, tiles
            pieces = zip(tags.get(at, ()), tags.get(size, ()), strict=False)
            need = max((offset + length for offset, length in pieces), default=0)
            if need > len(data):
                raise ValueError(f"{len(data)} bytes where the header promises {need}")
        if not (tags.get(273) or tags.get(324)):
            raise ValueError("the file ends before its image directory")


def turn(image: Pixels, orientation: int) -> Pixels:
    """Turn stored pixels ``(H, W, 3)`` upright as EXIF orientation 1 to 8 asks; contiguous."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _exif_orientation(block: bytes) -> int:
    return _valid(tiff_tags(block).get(_ORIENTATION_TAG, (1,))[0])


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1
