"""What the first bytes of an image file say: its kind, its size, and how EXIF wants it turned.

The limits of all decoding stand here, too: nothing is allocated before they are kept.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared_core.datasets.errors import UnsupportedImageError

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 120_000_000  # of one image; a camera of 100 megapixels stays below
MAX_SCANS = 500  # of one JPEG; an encoder writes 1 to about 12
MAX_SCANNED = 20 * MAX_PIXELS  # pixels times scans: each scan goes over the whole picture again

_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4}
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
# All that is ever asked for: size, bits, compression, colour, fill order, strips, samples, planes,
# fax options, tiles, extra samples, JPEG tables, orientation.
_TIFF_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 322, 323, 324, 325, 338, 347}
    | {_ORIENTATION_TAG}
)
# Within coded data 0xFF is followed by 0 or a restart; before a marker it may stand repeated.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
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
    """Name the format by its signature: jpeg, png, bmp, tiff, webp, gif, avif or unknown."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == _PNG_SIGNATURE:
        return "png"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "avif"
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

    Entries that do not fit into ``data`` are left out. Of a tag that stands twice the first counts.
    A directory of thousands of tags that all claim the whole file costs nothing.
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
        if tag not in _TIFF_TAGS or tag in tags or size == 0 or number == 0:
            continue
        if (kind in (2, 7) and tag != 347) or (tag == 347 and number > 1 << 16):
            continue  # plain bytes hold JPEG tables only
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


def stated_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels that an image file's header states, before EXIF turns it.

    Returns:
        None for an AVIF, whose size Pillow finds among its boxes.

    Raises:
        ValueError: an unknown kind, a header that is cut off, or a size of nothing.
    """
    kind = kind_of(data)
    try:
        if kind == "jpeg":
            header = jpeg_header(data)
            height, width = header.height, header.width
        elif kind == "png":
            width, height = struct.unpack_from(">II", data, 16)
        elif kind == "bmp":
            form = "<HH" if data[14:18] == b"\x0c\0\0\0" else "<ii"  # the oldest has 16-bit sizes
            width, height = (abs(n) for n in struct.unpack_from(form, data, 18))
        elif kind == "gif":
            width, height = struct.unpack_from("<HH", data, 6)
        elif kind == "tiff":
            _refuse_two_sizes(data)
            tags = tiff_tags(data)
            height, width = tags[257][0], tags[256][0]
        elif kind == "webp":
            height, width = _webp_size(data)
        elif kind == "avif":
            return None
        else:
            raise ValueError("not a JPEG, PNG, BMP, TIFF, WebP, GIF or AVIF file")
    except (struct.error, IndexError, KeyError):
        raise ValueError(f"the {kind.upper()} header is cut off") from None
    if not (height and width):
        raise ValueError(f"the header states {width} x {height} pixels")
    return height, width


def _refuse_two_sizes(data: bytes) -> None:
    """A TIFF directory that names width or height twice: readers differ in which one they take."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    ends = min(start + 2 + 12 * count, len(data) - 1)
    tags = [struct.unpack_from(order + "H", data, at)[0] for at in range(start + 2, ends, 12)]
    if tags.count(256) > 1 or tags.count(257) > 1:
        raise ValueError("the TIFF header states its size twice")


def check_pixels(height: int, width: int, name: str) -> None:
    """Refuse a picture of more than ``MAX_PIXELS``.

    Raises:
        UnsupportedImageError: it is.
    """
    if height * width > MAX_PIXELS:
        raise UnsupportedImageError(
            f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS}: cut or shrink it"
        )


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


def jpeg_scans(data: bytes) -> int:
    """How often a JPEG goes over the picture; at most that, where it is few.

    Segments are walked, for what lies within one, or behind the end, is no scan.
    """
    most = data.count(b"\xff\xda")
    if most <= 16:
        return most
    scans, position = 0, 2
    while (marker := _MARKER.search(data, position)) is not None:
        at = marker.start()
        if data[at + 1] == 0xD9:
            break
        scans += data[at + 1] == 0xDA
        position = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return scans


def fewest_bytes(data: bytes, kind: str, size: tuple[int, int]) -> int:
    """Bytes below which no file of this kind can hold so many pixels; 0 where there is no bound.

    A JPEG spends at least a bit on each block of 8 x 8, zlib packs at most 1,032 to 1.
    """
    height, width = size
    if kind == "jpeg" and jpeg_header(data).frame < 0xC8:  # those above are arithmetic
        return -(-height // 8) * -(-width // 8) // 8
    if kind == "png":
        samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(data[25], 1)
        return height * (1 + -(-width * samples * data[24] // 8)) // 1032
    return 0


def check_whole(data: bytes, kind: str) -> None:
    """Refuse a PNG, WebP or BMP that is shorter than its own header promises.

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
        (start,) = struct.unpack_from("<I", data, 10)
        oldest = data[14:18] == b"\x0c\0\0\0"
        form = "<HHHH" if oldest else "<iiHHI"
        width, height, _planes, bits, *packing = struct.unpack_from(form, data, 18)
        need = start + (abs(width) * bits + 31) // 32 * 4 * abs(height)
        if packing in ([], [0], [3]) and need > len(data):  # uncompressed rows of known length
            raise ValueError(f"{len(data)} bytes where the header promises {need}")


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
