"""TIFF: what a file's directory says, and whether its strips hold what it promises.

Neither libtiff nor those who call it refuse all damage: what is missing comes out black. So each
strip is looked at before the pixels are.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import simplejpeg
from PIL import Image, ImageOps

from shared_core.datasets.errors import UnsupportedImageError
from shared_core.datasets.reading.image_headers import tiff_tags

_NONE, _LZW, _JPEG, _PACKBITS = 1, 5, 7, 32773
_DEFLATE = (8, 32946)
_FAX = {2: "tiff_ccitt", 3: "group3", 4: "group4"}
_READ = (_NONE, _LZW, _JPEG, _PACKBITS, *_DEFLATE, *_FAX)
_POINTERS = (34665, 34853, 40965)  # to the directories of EXIF, GPS, interoperability
_LIBRARY_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8)  # of each kind of value


@dataclass(frozen=True)
class TiffFacts:
    """What the first directory says.

    Attributes:
        height, width: pixels as stored.
        bands: samples a pixel.
        bits: a sample.
        grey: whether one band is a picture (else red, green, blue, or a palette's index).
        alpha: "straight" or "premultiplied" where the fourth band is declared so, else None.
    """

    height: int
    width: int
    bands: int
    bits: int
    grey: bool
    alpha: str | None

    @property
    def extra(self) -> bool:
        """Whether a band follows that nothing declares as alpha."""
        return self.bands in (2, 4) and self.alpha is None


class TiffFile:
    """A TIFF in memory whose directory makes sense.

    Raises:
        ValueError: no directory, a size that stands twice or not at all, tables larger than files.
        UnsupportedImageError: more bands than a picture has, or a compression that is not read.
    """

    def __init__(self, data: bytes, *, name: str) -> None:
        self.data, self.name = data, name
        _check_directories(data)
        self.tags = tiff_tags(data)
        tags = self.tags
        if not (tags.get(273) or tags.get(324)):
            raise ValueError("the file ends before its image directory")
        bits = set(tags.get(258, (1,)))
        self.compression = tags.get(259, (_NONE,))[0]
        photometric, bands = tags.get(262, (2,))[0], tags.get(277, (1,))[0]
        if len(bits) > 1 or bands < 1:
            raise ValueError(f"{bands} bands of {sorted(bits)} bits, expected one depth")
        grey = photometric in (0, 1)
        if bands > 4 or (grey and bands > 2) or (not grey and bands == 2):
            raise UnsupportedImageError(
                f"{name}: {bands} bands, expected 1 (grey), 3 (red, green, blue) or 4 (and alpha): "
                "choose three and save them as RGB, for example by "
                "gdal_translate -b 4 -b 3 -b 2 -co PHOTOMETRIC=RGB"
            )
        if photometric in (8, 9, 10):
            raise UnsupportedImageError(f"{name}: CIE L*a*b* is not supported, save it as RGB")
        if self.compression not in _READ:
            raise UnsupportedImageError(
                f"{name}: TIFF compression {self.compression} is not supported, save it with LZW, "
                "Deflate or none"
            )
        kinds = {1: "premultiplied", 2: "straight"}
        alpha = kinds.get(tags.get(338, (0,))[0]) if photometric != 5 and bands in (2, 4) else None
        if photometric == 5 and bands == 4:
            alpha = "ink"  # black, the fourth colour of CMYK
        self.facts = TiffFacts(tags[257][0], tags[256][0], bands, bits.pop(), grey, alpha)
        self._photometric = photometric

    def _pieces(self) -> Iterator[tuple[bytes, int, int]]:
        """Strips or tiles: their bytes, and how many rows of how many pixels they hold.

        Raises:
            ValueError: one lies beyond the end of the file, or there are too few.
        """
        tags, facts = self.tags, self.facts
        planes = facts.bands if tags.get(284, (1,))[0] == 2 else 1
        if tags.get(324):
            starts, sizes = tags[324], tags.get(325, ())
            rows, columns = tags.get(323, (0,))[0], tags.get(322, (0,))[0]
            if not (rows and columns):
                raise ValueError("tiles without a size")
            shapes = [(rows, columns)] * (-(-facts.height // rows) * -(-facts.width // columns))
        else:
            starts, sizes = tags[273], tags.get(279, ())
            rows = min(tags.get(278, (facts.height,))[0], facts.height)
            if not rows:
                raise ValueError("strips of no rows")
            shapes = [
                (min(rows, facts.height - row), facts.width) for row in range(0, facts.height, rows)
            ]
        if len(starts) < planes * len(shapes) or len(sizes) < planes * len(shapes):
            raise ValueError(f"{len(starts)} strips, expected {planes * len(shapes)}")
        for shape, start, size in zip(shapes * planes, starts, sizes, strict=False):
            if start + size > len(self.data):
                raise ValueError(f"{len(self.data)} bytes where the header promises {start + size}")
            yield self.data[start : start + size], *shape

    def check(self) -> None:
        """Refuse strips that cannot hold their pixels, as far as their coding tells.

        Raises:
            ValueError: which strip, and why.
        """
        facts = self.facts
        planar = self.tags.get(284, (1,))[0] == 2
        bits = facts.bits * (1 if planar else facts.bands)
        if self._photometric == 6 and self.compression != _JPEG:
            bits = 8  # colour may be stored for several pixels at once: at least a byte each
        row = 0
        for number, (piece, rows, columns) in enumerate(self._pieces()):
            need = rows * -(-columns * bits // 8)
            whole = True
            if self.compression == _NONE:
                whole = len(piece) >= need
            elif self.compression in _DEFLATE:
                whole = _inflates(piece, need)
            elif self.compression == _PACKBITS:
                whole = _unpacked_length(piece) == need
            elif self.compression == _JPEG:
                whole = self._jpeg_is_whole(piece, rows, columns)
            if not whole:
                raise ValueError(f"strip {number} (rows from {row}) is damaged")
            row += rows

    def _jpeg_is_whole(self, piece: bytes, rows: int, columns: int) -> bool:
        tables = bytes(self.tags.get(347, ()))
        stream = tables[:-2] + piece[2:] if tables else piece
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(stream, strict=True)
            if width != columns or height < rows or height > rows + 16:
                return False
            simplejpeg.decode_jpeg(stream, "GRAY" if space == "GRAY" else "RGB", strict=True)
        except ValueError:
            return False
        return True

    def check_fax(self, picture: Image.Image) -> None:
        """Refuse faxed strips that, decoded and coded again, are others than those of the file.

        The coding of black and white pictures is one to one, and has no other sign of damage.

        Raises:
            ValueError: which strip.
        """
        if self.compression not in _FAX or self.tags.get(324):
            return
        if self._photometric == 0:  # Pillow writes black as 0
            picture = ImageOps.invert(picture)
        info = {292: self.tags[292][0]} if self.compression == 3 and 292 in self.tags else {}
        turned = self.tags.get(266, (1,))[0] == 2
        row = 0
        for number, (piece, rows, columns) in enumerate(self._pieces()):
            file = io.BytesIO()
            part = picture.crop((0, row, columns, row + rows))
            part.save(
                file, "TIFF", compression=_FAX[self.compression], strip_size=2**30, tiffinfo=info
            )
            again = tiff_tags(file.getvalue())
            start, size = again[273][0], again[279][0]
            coded = file.getvalue()[start : start + size]
            if turned:
                piece = bytes(int(f"{byte:08b}"[::-1], 2) for byte in piece)
            if not piece.startswith(coded[:-4]):  # the last ones may be an end mark, or none
                raise ValueError(
                    f"strip {number} (rows from {row}) is damaged, or coded in an unusual way; "
                    "if it is whole, save it with LZW or Deflate"
                )
            row += rows


def _inflates(piece: bytes, need: int) -> bool:
    """Whether a zlib stream gives so many bytes, ends, and has the right checksum."""
    machine = zlib.decompressobj()
    given, rest = 0, piece
    try:
        while rest and not machine.eof:
            given += len(machine.decompress(rest, 1 << 20))
            rest = machine.unconsumed_tail
            if given > need + (1 << 24):
                return False
    except zlib.error:
        return False
    return machine.eof and given >= need


def _unpacked_length(piece: bytes) -> int:
    """How many bytes a PackBits strip gives; 0 if it ends within a run."""
    at = given = 0
    end = len(piece)
    while at < end:
        count = piece[at]
        if count == 128:
            at += 1
        elif count < 128:
            given, at = given + count + 1, at + count + 2
        else:
            given, at = given + 257 - count, at + 2
    return given if at == end else 0


def _check_directories(data: bytes) -> None:
    """Refuse directories whose tables would fill memory.

    Pillow copies the bytes of every tag, so that thousands of tags which all claim the whole file
    would cost thousands of times its size.
    """
    order = "<" if data[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
        waiting, seen, total = [first], set(), 0
        while waiting:
            start = waiting.pop()
            if start in seen or start + 2 > len(data):
                continue
            seen.add(start)
            (count,) = struct.unpack_from(order + "H", data, start)
            stop = min(start + 2 + 12 * count, len(data) - 11)
            entries: list[Any] = [
                struct.unpack_from(order + "HHII", data, at) for at in range(start + 2, stop, 12)
            ]
            for tag, kind, number, value in entries:
                size = number * (_LIBRARY_BYTES[kind] if kind < len(_LIBRARY_BYTES) else 0)
                total += min(size, len(data))
                if tag in _POINTERS:
                    waiting.append(value)
            if total > 4 * len(data) + (1 << 20):
                raise ValueError("the TIFF directory claims more bytes than the file has")
    except struct.error:
        raise ValueError("the file ends within its header") from None
