"""A set of labelled images whose pixels come from files, a decoded cache, or an array."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.reading.decode import EncodedImage, read_bytes
from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.views.view_random import Key


class PixelStore(Protocol):
    """Decoded images found by key, as ``DecodedCache`` is."""

    def row(self, key: Key) -> int:
        """Where the image of this key lies."""

    def image(self, row: int) -> Pixels:
        """uint8 ``(H, W, 3)``, not to be written to."""


class ImageSet:
    """Labelled images in a fixed order.

    Args:
        paths: a file each; None when ``source`` is an array.
        labels: class numbers, ``(N,)``.
        keys: what names an image for its views and in caches: a content key (text) or a number.
            The index by default; give content keys where views are to be replayed after files
            were added or moved.
        source: ``"files"``, a ``DecodedCache``, or decoded images uint8 ``(N, H, W, 3)``.

    Raises:
        DatasetError: lengths differ, a key is not in the cache, or the array is not uint8 NHWC.
    """

    def __init__(
        self,
        paths: Sequence[str | Path] | None,
        labels: Sequence[int] | npt.NDArray[np.integer],
        keys: Sequence[Key] | None = None,
        *,
        source: Literal["files"] | PixelStore | npt.NDArray[np.uint8] = "files",
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64).reshape(-1)
        number = len(self.labels)
        self.paths = None if paths is None else [os.fspath(path) for path in paths]
        self.keys: list[Key] = list(range(number)) if keys is None else list(keys)
        for name, items in (("paths", self.paths), ("keys", self.keys)):
            if items is not None and len(items) != number:
                raise DatasetError(f"{len(items)} {name} for {number} labels, expected as many")
        self.array: Pixels | None = None
        self._store: PixelStore | None = None
        self._rows: list[int] = []
        if isinstance(source, np.ndarray):
            if source.ndim != 4 or source.shape[3] != 3 or source.dtype != np.uint8:
                raise DatasetError(
                    f"images {source.dtype} of shape {source.shape}, expected uint8 (N, H, W, 3)"
                )
            if len(source) != number:
                raise DatasetError(f"{len(source)} images for {number} labels, expected as many")
            self.array = source
        elif isinstance(source, str):
            if source != "files":
                raise DatasetError(
                    f"image source {source!r}, expected 'files', a cache or an array"
                )
            if self.paths is None:
                raise DatasetError("no paths given for images from files")
        else:
            self._store = source
            self._rows = [source.row(key) for key in self.keys]

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[tuple[str, int, Key]],
        *,
        root: str | Path,
        source: Literal["files"] | PixelStore = "files",
    ) -> ImageSet:
        """From (path relative to ``root``, label, key), as ``Manifest.subset`` gives them."""
        listed = list(rows)
        paths = [os.path.join(root, *path.split("/")) for path, _label, _key in listed]
        return cls(
            paths,
            [label for _path, label, _key in listed],
            [key for _path, _label, key in listed],
            source=source,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"image {index}" if self.paths is None else self.paths[index]

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> ImageSet:
        """The images at ``indices``, in that order, from the same source."""
        chosen = [int(index) for index in indices]
        paths = None if self.paths is None else [self.paths[n] for n in chosen]
        keys = [self.keys[n] for n in chosen]
        labels = self.labels[chosen]
        if self.array is not None:
            return ImageSet(paths, labels, keys, source=self.array[chosen])
        if self._store is not None:
            return ImageSet(paths, labels, keys, source=self._store)
        return ImageSet(paths, labels, keys)

    def with_source(self, source: Literal["files"] | PixelStore) -> ImageSet:
        """The same images from another source."""
        return ImageSet(self.paths, self.labels, self.keys, source=source)

    def open(self, index: int) -> EncodedImage | Pixels:
        """An image: decoded where the source holds pixels, else ready to be decoded.

        Raises:
            FileNotFoundError, DecodeError: the file is missing or no image; names it.
        """
        if self.array is not None:
            image: Pixels = self.array[index]
            return image
        if self._store is not None:
            return self._store.image(self._rows[index])
        path = self.name(index)
        return EncodedImage(read_bytes(path), name=path)

    def image(self, index: int) -> Pixels:
        """The whole image, uint8 ``(H, W, 3)``, upright; not to be written to."""
        opened = self.open(index)
        return opened.pixels() if isinstance(opened, EncodedImage) else opened
