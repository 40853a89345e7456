"""Walk over a pickle's instructions before it is loaded: what would fill memory is refused.

A pickle of nine bytes may ask for a table of half a billion entries (the index under which a value
is remembered), and lengths are believed before the bytes are there.
"""

import io
import pickletools
from typing import BinaryIO

_REMEMBER = ("PUT", "BINPUT", "LONG_BINPUT")
_MOST = 20_000_000  # instructions; the state of an optimizer with a million parameters has fewer


class PickleRefused(Exception):
    """The pickle would cost far more than its size."""


class _Rest:
    """A file from where it stands, that is never asked for more than it has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        here = file.tell()
        self._left = file.seek(0, io.SEEK_END) - here
        file.seek(here)

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(self._left if count < 0 else min(count, self._left))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(1 << 16)
        self._left -= len(data)
        return data

    def tell(self) -> int:
        return self._file.tell()


def check_pickle(file: BinaryIO) -> None:
    """Look at the pickle that begins where ``file`` stands; the file stands there again after.

    Raises:
        PickleRefused: a memory index beyond the instructions, or too many of them.
        ValueError: no pickle, or one that is cut off.
    """
    start = file.tell()
    count = 0
    for instruction, argument, _ in pickletools.genops(_Rest(file)):  # type: ignore[arg-type]
        count += 1
        if instruction.name in _REMEMBER and not 0 <= int(argument or 0) <= count:
            raise PickleRefused(f"a memory index of {argument} after {count} instructions")
        if count > _MOST:
            raise PickleRefused(f"more than {_MOST} instructions")
    file.seek(start)
