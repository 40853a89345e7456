"""Archives and folders into a new folder: nothing escapes, nothing explodes, all of it or nothing.

The content is written to a hidden sibling of the target and renamed at the end; a run that was
killed is continued by the next one, which skips the files that are there already.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.finding.scan import is_image_name, part_of
from shared_core.texts import CHINESE, say

MARKER = ".unpacked.json"  # in the finished folder: from what it was made
_BLOCK = 1 << 20
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class Limits:
    """What an archive may expand to.

    Attributes:
        max_bytes: in all; ImageNet-1k has about 160e9.
        max_files: number of files.
        max_ratio: bytes out for a byte in, looked at above 100 MB: images hardly compress.
    """

    max_bytes: int = 400 * 10**9
    max_files: int = 5_000_000
    max_ratio: float = 200.0


@dataclass(frozen=True)
class _Member:
    """A file to be written: its path parts, size in bytes, and how to open it."""

    parts: tuple[str, ...]
    size: int
    open: Callable[[], IO[bytes]]


def _safe_parts(name: str, archive: Path) -> tuple[str, ...]:
    """Path parts of a member below the target.

    Raises:
        DatasetError: the name is absolute, climbs up, or holds what some system reads as such.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or ":" in parts[0]:
        raise DatasetError(f"{archive}: member {name!r} would be written outside of the target")
    return tuple(part for part in parts if part not in ("", "."))


def _wanted(parts: tuple[str, ...]) -> bool:
    return bool(parts) and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


@contextmanager
def _members(source: Path) -> Iterator[Iterator[_Member]]:
    """The files of an archive or folder; unsafe members are errors, hidden ones passed over."""
    if source.is_dir():
        yield _folder_members(source)
        return
    with open(source, "rb") as file:
        head = file.read(4)
    # The first bytes tell, for a tar may end in a zip; only a zip that unpacks itself has others.
    if head[:2] != b"PK" and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            yield _tar_members(tar, source)
    elif head[:2] == b"PK" or zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            yield _zip_members(archive, source)
    else:
        raise DatasetError(f"{source} is neither a zip, a tar nor a folder")


def _folder_members(source: Path) -> Iterator[_Member]:
    for folder, folders, files in os.walk(source):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            parts = path.relative_to(source).parts
            if _wanted(parts) and path.is_file():
                yield _Member(parts, path.stat().st_size, lambda path=path: open(path, "rb"))  # type: ignore[misc]


def _zip_names(archive: zipfile.ZipFile, source: Path) -> list[str]:
    """The members' names. Without the flag for UTF-8 a zip may mean anything: UTF-8 (many programs
    forget the flag), GBK (Windows in China), else code page 437, as the format says."""
    names = [info.orig_filename for info in archive.infolist()]
    old = [n for n, info in enumerate(archive.infolist()) if not info.flag_bits & 0x800]
    raw = [names[n].encode("cp437") for n in old]
    if all(name.isascii() for name in raw):
        return names
    for encoding in ("utf-8", CHINESE, "cp437"):
        try:
            read = [name.decode(encoding) for name in raw]
        except UnicodeDecodeError:
            continue
        for n, name in zip(old, read, strict=True):
            names[n] = name
        say(
            f"note: the names in {source} do not say their encoding, read as {encoding}", sys.stderr
        )
        break
    return names


def _zip_members(archive: zipfile.ZipFile, source: Path) -> Iterator[_Member]:
    for info, name in zip(archive.infolist(), _zip_names(archive, source), strict=True):
        parts = _safe_parts(name, source)
        mode = info.external_attr >> 16
        if info.create_system == 3 and mode and stat.S_ISLNK(mode):
            raise DatasetError(f"{source}: member {name!r} is a link; links are refused")
        if info.flag_bits & 1:
            raise DatasetError(f"{source}: member {name!r} is encrypted")
        if info.compress_type not in _ZIP_METHODS:
            method = {9: "Deflate64", 93: "Zstandard"}.get(info.compress_type, "an unusual method")
            raise DatasetError(
                f"{source}: member {name!r} is packed by {method} ({info.compress_type}), which "
                "is not read; unpack it, and prepare the folder"
            )
        if not name.endswith("/") and not info.is_dir() and _wanted(parts):
            yield _Member(parts, info.file_size, lambda info=info: archive.open(info))  # type: ignore[misc]


def _tar_members(tar: tarfile.TarFile, source: Path) -> Iterator[_Member]:
    for info in tar:
        parts = _safe_parts(_tar_name(info.name), source)
        if info.isdir():
            continue
        if not info.isfile():
            kind = "a link" if info.issym() or info.islnk() else "no plain file"
            raise DatasetError(f"{source}: member {info.name!r} is {kind}; only files are taken")
        if _wanted(parts):

            def opened(info: tarfile.TarInfo = info) -> IO[bytes]:
                file = tar.extractfile(info)
                if file is None:
                    raise DatasetError(f"{source}: member {info.name!r} cannot be read")
                return file

            yield _Member(parts, info.size, opened)
    _check_tar_end(tar, source)


def _tar_name(name: str) -> str:
    """A name whose bytes are no UTF-8 is taken for GBK, if it can be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        try:
            return name.encode("utf-8", "surrogateescape").decode(CHINESE)
        except UnicodeDecodeError:
            pass
    return name


def _check_tar_end(tar: tarfile.TarFile, source: Path) -> None:
    """Refuse a tar without its two empty blocks at the end, and read on to the checksum.

    ``tarfile`` takes a damaged header, and the end of the file, for the end of the archive.
    """
    stream = tar.fileobj
    if stream is None:
        raise DatasetError(f"{source} cannot be read")
    stream.seek(tar.offset)
    if stream.read(1024) != bytes(1024):
        raise DatasetError(f"{source} is damaged: no end of the archive at byte {tar.offset}")
    while stream.read(_BLOCK):
        pass


def _identity(source: Path) -> dict[str, object]:
    """What tells one source from another without reading it all: name, size, time."""
    state = source.stat()
    identity: dict[str, object] = {"name": source.name}
    if source.is_file():
        identity |= {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}
    else:
        names = hashlib.sha256()
        for member in _folder_members(source):
            names.update(f"{member.size} {'/'.join(member.parts)}\n".encode("utf-8", "replace"))
        identity |= {"path": str(source.resolve()), "listing": names.hexdigest()}
    return identity


def unpack(source: str | Path, target: str | Path, *, limits: Limits) -> Path:
    """Unpack ``source`` into the new folder ``target``; a single wrapping folder is taken off.

    Returns:
        ``target``. When it was made from this source before, nothing is done.

    Raises:
        DatasetNotFoundError: no such source.
        DatasetError: unsafe or damaged archive, over ``limits``, not enough disk, target in use.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise DatasetNotFoundError(f"nothing to prepare at {source}; expected a zip, tar or folder")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise DatasetError(f"target {target} lies inside the source {source}")
    identity = _identity(source)
    if target.exists():
        if not target.is_dir():
            raise DatasetError(f"target {target} is no folder")
        if _read_marker(target) == identity:
            return target
        if any(target.iterdir()):
            raise DatasetError(f"target {target} is not empty, and was not made from {source}")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    scratch = target.absolute().parent / f".{target.name}.unpacking-{digest}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        _extract(source, scratch, limits)
    except (*_DAMAGED, DatasetError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of this machine; bz2 raises without
            raise
        shutil.rmtree(scratch, ignore_errors=True)  # a refused archive leaves nothing behind
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{source} is damaged: {' '.join(str(error).split())}") from None
    inner = _strip_wrapper(scratch)
    (inner / MARKER).write_text(json.dumps(identity) + "\n", encoding="utf-8")
    if target.exists():
        target.rmdir()  # empty, as checked
    os.rename(inner, target)
    shutil.rmtree(scratch, ignore_errors=True)
    return target


def _read_marker(target: Path) -> object:
    try:
        return json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _extract(source: Path, scratch: Path, limits: Limits) -> None:
    packed = source.stat().st_size if source.is_file() else None
    with _members(source) as members:
        listed: list[_Member] = []
        total = 0
        seen: set[str] = set()
        for member in members:
            total += member.size
            listed.append(member)
            _check_limits(source, total, len(listed), packed, limits)
            name = "/".join(member.parts)
            if name in seen:
                raise DatasetError(f"{source} holds {name!r} twice")
            seen.add(name)
        free = shutil.disk_usage(scratch).free
        done = sum(f.stat().st_size for f in scratch.rglob("*") if f.is_file())
        if total - done > free:
            raise DatasetError(
                f"{source} needs {(total - done) / 1e9:.2f} GB at {scratch.parent}, "
                f"{free / 1e9:.2f} GB are free"
            )
        for member in listed:
            _write_member(member, scratch, source)


def _check_limits(source: Path, total: int, files: int, packed: int | None, limits: Limits) -> None:
    if total > limits.max_bytes:
        raise DatasetError(f"{source} expands to more than {limits.max_bytes:,} bytes; refused")
    if files > limits.max_files:
        raise DatasetError(f"{source} holds more than {limits.max_files:,} files; refused")
    if packed is not None and total > 10**8 and total > limits.max_ratio * packed:
        raise DatasetError(
            f"{source} expands to more than {limits.max_ratio:g} times its size; refused"
        )


def _write_member(member: _Member, scratch: Path, source: Path) -> None:
    path = scratch.joinpath(*member.parts)
    if path.is_file() and path.stat().st_size == member.size:
        return  # written whole by an earlier run: files get their name only when complete
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    written = 0
    with member.open() as reader, open(part, "wb") as writer:
        while block := reader.read(_BLOCK):
            written += len(block)
            if written > member.size:  # the archive's own table lied
                break
            writer.write(block)
    if written != member.size:
        raise DatasetError(
            f"{source}: member {'/'.join(member.parts)!r} does not have its {member.size} bytes"
        )
    os.replace(part, path)


def _strip_wrapper(folder: Path) -> Path:
    """Step into single folders that hold nothing but folders: ``AID/<class>/...`` in AID.zip."""
    while True:
        inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
        folders = [p for p in inside if p.is_dir()]
        if len(folders) != 1 or any(is_image_name(p.name) for p in inside if p.is_file()):
            return folder
        (only,) = folders
        if part_of(only.name) is not None or not any(p.is_dir() for p in only.iterdir()):
            return folder
        folder = only
