"""Text that users hand in, and names that are written out: one reader, one writer; no framework.

People's lists come from Notepad (a byte order mark, CRLF), from Windows (backslashes, GBK), from
``ls`` (bytes that are no UTF-8). Names go to JSON, tables, terminals and plots whatever they hold.
"""

from __future__ import annotations

import codecs
import json
import locale
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

CHINESE = "gb18030"  # holds GBK and GB2312
_MARKS = (  # the longer first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control, half characters, line ends
_LARGEST = 1 << 30  # bytes of a list


@dataclass(frozen=True)
class Text:
    """What a file says, without its byte order mark, and how it was understood.

    ``note`` is a line for the user where the encoding had to be guessed, else None.
    """

    content: str
    encoding: str
    note: str | None = None

    def lines(self) -> list[str]:
        """The lines without their ends, whatever these are; empty ones stay."""
        return self.content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def decode_text(data: bytes, *, where: object, known: Collection[str] = ()) -> Text:
    """Bytes that a user hands in: by their mark, as UTF-8, else as the most fitting of others.

    Args:
        where: what to call them in notes and errors.
        known: names that the text should hold (files, classes). The reading that holds the most of
            them is taken: UTF-8, the system's encoding, GBK, or UTF-8 with other bytes kept as
            Python keeps them in file names.

    Raises:
        ValueError: no text: bytes that nothing reads, or null characters.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return Text(data[len(mark) :].decode(encoding), encoding)
            except UnicodeDecodeError:
                raise ValueError(f"{where}: damaged {encoding.upper()} text") from None
    if b"\0" in data:
        raise ValueError(f"{where}: no text, it holds null characters")
    readings = list(_readings(data))
    names = set(known)

    def held(text: Text) -> int:
        return sum(_first_field(line) in names for line in text.lines())

    # Short GBK names may be UTF-8 by accident, so the names decide; without any the first does.
    best = max(readings, key=held) if names else readings[0]
    if best.encoding == "utf-8":
        return best
    note = f"{where} is no UTF-8; it was read as {best.encoding.upper()}"
    return Text(best.content, best.encoding, note)


def _readings(data: bytes) -> Iterator[Text]:
    """The texts that bytes may be, the likeliest first; the last always is one."""
    system = codecs.lookup(locale.getpreferredencoding(False)).name
    for encoding in dict.fromkeys(("utf-8", system, CHINESE)):
        if encoding != "ascii":
            try:
                yield Text(data.decode(encoding), encoding)
            except UnicodeDecodeError:
                continue
    yield Text(data.decode("utf-8", "surrogateescape"), "utf-8 with other bytes kept")


def _first_field(line: str) -> str:
    return line.split("\t")[0].split(",")[0].replace("\\", "/").removeprefix("./").strip()


def read_text(path: str | Path, *, known: Collection[str] = ()) -> Text:
    """Read a text file; see :func:`decode_text`.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        ValueError: no file (a folder, a pipe), or no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is no text file")
    return decode_text(path.read_bytes(), where=path, known=known)


def clean_lines(lines: Iterable[str | bytes]) -> Iterator[str]:
    """Lines of a stream (standard input), each as soon as it is there: no mark, no line end.

    Bytes that are no UTF-8 are kept as Python keeps them in file names.
    """
    first = True
    for line in lines:
        text = line if isinstance(line, str) else os.fsdecode(line)
        if first:
            text = text.removeprefix("\ufeff").removeprefix("\xef\xbb\xbf")
            text = text.removeprefix("\udcef\udcbb\udcbf")
            first = False
        yield text.rstrip("\r\n")


@dataclass(frozen=True)
class Entries:
    """The entries of a list: a name, and what stands behind the tab.

    ``notes`` are lines for the user; ``numbers`` the line of each entry, counted from 1.
    """

    names: tuple[str, ...]
    rests: tuple[str, ...]
    numbers: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_entries(path: str | Path, *, known: Collection[str] = ()) -> Entries:
    """A list of one entry a line; empty lines and those that begin with ``#`` are passed over.

    What follows a tab is the entry's rest. A name in double quotes is JSON.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`read_text`, or a name that is no JSON.
    """
    text = read_text(path, known=known)
    names, rests, numbers = [], [], []
    for number, line in enumerate(text.lines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition("\t")
        if name.startswith('"'):
            try:
                name = str(json.loads(name))
            except ValueError:
                raise ValueError(f"{path} line {number}: {name!r} is no JSON string") from None
        names.append(name)
        rests.append(rest)
        numbers.append(number)
    notes = () if text.note is None else (text.note,)
    return Entries(tuple(names), tuple(rests), tuple(numbers), notes)


@dataclass(frozen=True)
class Matched:
    """``found``: given name to known name; ``missing``: given names that match nothing."""

    found: dict[str, str]
    missing: tuple[str, ...]

    def note(self, where: object, what: str = "file") -> str | None:
        """One line that counts and names what matches nothing; None where all do."""
        if not self.missing:
            return None
        total = len(self.found) + len(self.missing)
        return (
            f"{len(self.missing)} of {total} entries of {where} match no {what}: "
            f"{first_names(self.missing)}"
        )


def match_names(given: Iterable[str], known: Iterable[str]) -> Matched:
    """Find each given name among the known ones: exact, else with slashes turned and ``./`` off,
    else equal but for the spelling of accents (NFC), else without blanks around it."""
    exact = {name: name for name in known}
    composed: dict[str, str] = {}
    for name in exact:
        composed.setdefault(unicodedata.normalize("NFC", name), name)
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in given:
        turned = plain_path(name)
        for one in (name, turned, turned.strip()):
            hit = exact.get(one) or composed.get(unicodedata.normalize("NFC", one))
            if hit is not None:
                found[name] = hit
                break
        else:
            missing.append(name)
    return Matched(found, tuple(dict.fromkeys(missing)))


def plain_path(name: str) -> str:
    """A relative path with forward slashes, no ``./`` before it, none doubled."""
    parts = name.replace("\\", "/").split("/")
    lead = "/" if name.startswith(("/", "\\")) else ""
    return lead + "/".join(part for part in parts if part not in ("", "."))


def first_names(names: Collection[str], most: int = 3) -> str:
    """The first few of some names, as they can be printed."""
    listed = [printable(name) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(listed) + (", ..." if len(names) > most else "")


def read_json(path: str | Path) -> Any:
    """Any JSON value of a file that a user hands in.

    Raises:
        FileNotFoundError, OSError: it is not there, or cannot be read.
        ValueError: no JSON, or nested too deeply; one line that names the file.
    """
    return parse_json(read_text(path).content, where=path)


def parse_json(text: str, *, where: object) -> Any:
    """Any JSON value.

    Raises:
        ValueError: no JSON, or nested too deeply; one line that names ``where``.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, {' '.join(str(error).split())}") from None


# -- writing --------------------------------------------------------------------------------------


def printable(text: str) -> str:
    r"""The text on one line: control characters escaped, bytes that are no UTF-8 as ``\xNN``."""
    return "".join(_escape(c) if unicodedata.category(c) in _UNPRINTABLE else c for c in text)


def _escape(c: str) -> str:
    code = ord(c)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(c)[1:-1]


def as_utf8(text: str) -> bytes:
    r"""UTF-8 of any text, for JSON documents and tables: half characters become ``\udcNN``.

    In a JSON string this is an escape, so that programs get back the very name.
    """
    return text.encode("utf-8", "backslashreplace")


def fitting(text: str, encoding: str | None) -> str:
    """The text with what an encoding lacks written out."""
    encoding = encoding or "utf-8"
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return text.encode("ascii", "backslashreplace").decode("ascii")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once; what the stream's encoding lacks is written out."""
    out = sys.stdout if stream is None else stream
    print(fitting(text, getattr(out, "encoding", None)), file=out, flush=True)


def safe_streams() -> None:
    """From here on nothing that is printed can fail for its characters; they are written out."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
