"""A decoded cache: the pixels of many images of any size in one memory-mapped file.

``pixels.bin`` holds the images one after another, uint8 ``(H, W, 3)`` rows; ``index.json`` says for
each key where, of what size, and what the cache was made from. A cache is made in a folder beside
its place and moved there when it is whole: a killed build leaves nothing that could be opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.reading.decode import EncodedImage, dct_factor, read_bytes
from shared_core.datasets.reading.image_headers import Pixels, stated_size
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.views.geometry import resize, short_side_size
from shared_core.datasets.views.view_random import Key

SCHEMA = 1
_INDEX, _PIXELS = "index.json", "pixels.bin"


class DecodedCache:
    """Decoded images by key; open or build it with ``open``, ``build`` or ``open_or_build``."""

    def __init__(self, folder: Path, index: dict[str, Any], pixels: Pixels) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = index["settings"]
        self._pixels = pixels
        self._offsets: list[int] = index["offsets"]
        self._sizes: list[list[int]] = index["sizes"]
        self._rows: dict[Key, int] = {key: row for row, key in enumerate(index["keys"])}

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def nbytes(self) -> int:
        """Size of the pixels in bytes."""
        return int(self._pixels.size)

    def row(self, key: Key) -> int:
        """Where the image of this key lies.

        Raises:
            DatasetError: the cache has no such image.
        """
        try:
            return self._rows[key]
        except KeyError:
            raise DatasetError(f"decoded cache {self.folder} has no image of key {key!r}") from None

    def image(self, row: int) -> Pixels:
        """The image of a row, uint8 ``(H, W, 3)``, read-only, straight from the mapped file."""
        start = self._offsets[row]
        height, width = self._sizes[row]
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        image_set: ImageSet,
        *,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> DecodedCache:
        """Open the cache of ``image_set``'s files, if it is one.

        Text keys are taken as content keys: equal keys mean equal files. Number keys say nothing
        of the content, so each file's size and time of change must be those of the build, too.

        Raises:
            FileNotFoundError: no cache there.
            DatasetError: stale or damaged: of other settings, other files, or not whole.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            stale = _difference(index, image_set, _settings(short_side, size))
        except FileNotFoundError:
            raise FileNotFoundError(f"no decoded cache in {folder}") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DatasetError(f"decoded cache {folder} cannot be read: {error}") from None
        if stale:
            raise DatasetError(f"decoded cache {folder} is stale: {stale}")
        path = folder / _PIXELS
        found = path.stat().st_size if path.exists() else 0
        if found != index["bytes"]:
            raise DatasetError(
                f"decoded cache {folder} holds {found} bytes, expected {index['bytes']}"
            )
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        # The plain array of the same memory: slicing a memmap object costs microseconds.
        return cls(folder, index, mapped.view(np.ndarray))

    @classmethod
    def build(
        cls,
        image_set: ImageSet,
        folder: str | Path,
        *,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
        threads: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodedCache:
        """Decode every file of ``image_set`` into ``folder``, replacing what cache is there.

        Args:
            image_set: from files; images of one key are stored once.
            folder: the cache's own folder.
            short_side: shrink images whose shorter side is longer to this many pixels (by area).
            size: resize every image to exactly ``(height, width)`` (by area), not keeping the
                aspect ratio; not together with ``short_side``.
            threads: that decode.
            progress: called with (images done, images in all).

        Raises:
            DatasetError: no files, or ``folder`` holds something that is not a cache.
            DecodeError: a file cannot be decoded.
        """
        folder = Path(folder)
        settings = _settings(short_side, size)
        if image_set.paths is None:
            raise DatasetError("a decoded cache is made from files, got images without paths")
        if folder.exists() and any(folder.iterdir()) and not (folder / _INDEX).exists():
            raise DatasetError(f"{folder} is not empty and not a decoded cache; not replacing it")
        first: dict[Key, int] = {}  # key -> index of its first image
        for n, key in enumerate(image_set.keys):
            first.setdefault(key, n)
        chosen = list(first.values())
        _check_disk(image_set, chosen, folder, short_side, size)
        part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        for left_over in folder.parent.glob(f".{folder.name}.part-*"):
            process = left_over.name.rpartition("-")[2]
            if left_over == part or (process.isdigit() and not _alive(int(process))):
                shutil.rmtree(left_over, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            offsets, sizes, position = [], [], 0
            with open(part / _PIXELS, "wb") as file:
                for n, image in enumerate(_decoded(image_set, chosen, short_side, size, threads)):
                    image.tofile(file)
                    offsets.append(position)
                    sizes.append([int(image.shape[0]), int(image.shape[1])])
                    position += image.size
                    if progress is not None:
                        progress(n + 1, len(chosen))
                file.flush()
                os.fsync(file.fileno())
            index = {
                "schema": SCHEMA,
                "settings": settings,
                "keys": list(first),
                "stamps": [_stamp(image_set.paths[n]) for n in chosen],
                "offsets": offsets,
                "sizes": sizes,
                "bytes": position,
                "identity": _identity(list(first), settings),
            }
            with open(part / _INDEX, "w", encoding="utf-8") as text:
                json.dump(index, text)
                text.flush()
                os.fsync(text.fileno())
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return cls.open(folder, image_set, short_side=short_side, size=size)

    @classmethod
    def open_or_build(
        cls,
        image_set: ImageSet,
        folder: str | Path,
        *,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
        threads: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodedCache:
        """Open the cache, or build it where it is missing or stale."""
        try:
            return cls.open(folder, image_set, short_side=short_side, size=size)
        except (FileNotFoundError, DatasetError):
            return cls.build(
                image_set,
                folder,
                short_side=short_side,
                size=size,
                threads=threads,
                progress=progress,
            )


def _settings(short_side: int | None, size: tuple[int, int] | None) -> dict[str, Any]:
    if short_side is not None and size is not None:
        raise ValueError("both short_side and size given, expected at most one")
    if min(1 if short_side is None else short_side, *(size or (1, 1))) < 1:
        raise ValueError(f"short side {short_side}, size {size}, expected at least 1 pixel")
    return {"short_side": short_side, "size": None if size is None else list(size)}


def _identity(keys: list[Key], settings: dict[str, Any]) -> str:
    text = json.dumps([SCHEMA, keys, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(index: dict[str, Any], image_set: ImageSet, settings: dict[str, Any]) -> str:
    """Why a cache is not the one asked for; empty when it is."""
    if index["schema"] != SCHEMA:
        return f"schema {index['schema']}, expected {SCHEMA}"
    if index["settings"] != settings:
        return f"made with {index['settings']}, expected {settings}"
    if index["identity"] != _identity(index["keys"], settings):
        return "its index was changed"
    rows = {key: row for row, key in enumerate(index["keys"])}
    for n, key in enumerate(image_set.keys):
        row = rows.get(key)
        if row is None:
            return f"no image of key {key!r}, expected {len(image_set)} images"
        if not isinstance(key, str):
            if image_set.paths is None:
                return "images without paths or content keys cannot be compared"
            if list(_stamp(image_set.paths[n])) != list(index["stamps"][row]):
                return f"{image_set.name(n)} was changed since"
    return ""


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _check_disk(
    image_set: ImageSet,
    chosen: list[int],
    folder: Path,
    short_side: int | None,
    size: tuple[int, int] | None,
) -> None:
    """Refuse before hours of decoding what the disk cannot hold, by the headers of some files."""
    known = []
    for index in chosen[:: max(1, len(chosen) // 256)]:
        try:
            with open(image_set.name(index), "rb") as file:
                whole = stated_size(file.read(1 << 16))
        except (OSError, ValueError):  # told when it is decoded
            continue
        if whole is not None:
            target = size or whole
            if short_side is not None and short_side < min(whole):
                target = short_side_size(whole, short_side)
            known.append(3 * target[0] * target[1])
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    need = sum(known) / max(1, len(known)) * len(chosen)
    free = shutil.disk_usage(place).free
    if need > free:
        raise DatasetError(
            f"decoded cache {folder} needs about {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _decoded(
    image_set: ImageSet,
    chosen: list[int],
    short_side: int | None,
    size: tuple[int, int] | None,
    threads: int,
) -> Iterator[Pixels]:
    """The images in order, decoded ahead by threads, a bounded number at a time."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[Future[Pixels]] = deque()
        try:
            for index in chosen:
                waiting.append(pool.submit(_shrunk, image_set.name(index), short_side, size))
                if len(waiting) >= 8 * max(1, threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _shrunk(path: str, short_side: int | None, size: tuple[int, int] | None) -> Pixels:
    encoded = EncodedImage(read_bytes(path), name=path)
    whole = (encoded.height, encoded.width)
    target = size
    if short_side is not None and short_side < min(whole):
        target = short_side_size(whole, short_side)
    if target is None:
        return encoded.pixels()
    image = encoded.pixels(factor=dct_factor(whole, target) if encoded.reducible else 1)
    return resize(image, target, method="area")
