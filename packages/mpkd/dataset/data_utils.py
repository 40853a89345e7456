"""From any source to three sets of images, a written-down split and loaders of replayable views."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpkd.dataset import views
from mpkd.model.networks import PLAIN, Sight
from shared_core.datasets import (
    BatchLoader,
    DatasetError,
    DecodedCache,
    EpochOrder,
    ImageSet,
    Manifest,
)
from shared_core.datasets.finding.fingerprint import content_keys, key_of_bytes
from shared_core.datasets.finding.scan import list_images
from shared_core.datasets.splitting.manifest import Entry, sorted_entries
from shared_core.datasets.views.geometry import resize
from shared_core.for_torch.data import Normalizer, TorchBatch, TorchLoader
from shared_core.runs.seeds import derive_seed

TRAIN, CALIBRATION, TEST = "train", "calibration", "test"
SPLIT_FILE = "split.json"
NO_LABEL = 0  # what stands for the label of an image that has none; no loss may read it


@dataclass(frozen=True)
class Data:
    """Images that are ready to train on.

    Attributes:
        name: as records call the set.
        kind: ``real``, ``subset`` (fewer images than the published set), or ``built-in``.
        classes: class names in the order of the logits.
        image_size: side in pixels that networks see.
        split_hash: of the split manifest.
        sets: the images by part: train, calibration, test.
        unlabelled: further images for distillation; None without.
        mirror: whether augmentation may mirror.
        whole: small images that are enlarged as they are; no part is cut out of them.
        crop: smallest share of a large image that a training view shows.
        notes: what differs from the published set.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    image_size: int
    split_hash: str
    sets: dict[str, ImageSet]
    unlabelled: ImageSet | None = None
    mirror: bool = True
    notes: tuple[str, ...] = ()
    whole: bool = False
    crop: float = 0.08

    @property
    def small(self) -> bool:
        """Whether all pixels are in memory."""
        return views.is_small(self.image_size)

    def facts(self) -> dict[str, Any]:
        """What a record says of the data."""
        counts = {part: len(images) for part, images in self.sets.items()}
        extra = {} if self.unlabelled is None else {"unlabelled": len(self.unlabelled)}
        return {
            "name": self.name,
            "kind": self.kind,
            "images": sum(counts.values()),
            "pixels": self.image_size,
            "split_hash": self.split_hash,
            "splits": {**counts, **extra},
            "notes": list(self.notes),
        }

    def shares(self, part: str) -> list[float]:
        """Share of each class among the images of a part, in ``[0, 1]``."""
        counts = np.bincount(self.sets[part].labels, minlength=len(self.classes))
        return (counts / max(1, counts.sum())).tolist()

    def learning_set(self, *, unlabelled: bool) -> ImageSet:
        """The training images, with those without labels behind them when ``unlabelled``."""
        train = self.sets[TRAIN]
        if not unlabelled or self.unlabelled is None:
            return train
        return joined(train, self.unlabelled)


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """Two sets behind each other; both from arrays, or both from files or caches."""
    labels = np.concatenate([first.labels, second.labels])
    keys = [*first.keys, *second.keys]
    if first.array is not None and second.array is not None:
        return ImageSet(None, labels, keys, source=np.concatenate([first.array, second.array]))
    if first.paths is None or second.paths is None:
        raise DatasetError("images in an array and images in files cannot be one set")
    return ImageSet([*first.paths, *second.paths], labels, keys)


# -- splits ---------------------------------------------------------------------------------------


def divide(
    labels: npt.NDArray[np.int64],
    keys: Sequence[str],
    parts: Sequence[str | None],
    *,
    val_split: float,
    test_split: float,
    seed: int,
    max_images: int,
) -> list[str | None]:
    """The part of every image; None for one that is left out.

    Given parts stay. Without a test part ``test_split`` of the images becomes one, without a
    calibration part ``val_split`` of the training images does, class by class, those whose hash
    with the seed is smallest: adding an image moves hardly any other, and copies stay together.

    Args:
        parts: ``train``, ``calibration``, ``test``, or None where nothing is given.
        max_images: at most so many training images, the same share of each class; 0 = all.
    """  # fmt: skip
    given = {part for part in parts if part is not None}
    chosen: list[str | None] = [part or TRAIN for part in parts]

    def move(part: str, share: float) -> None:
        for label in np.unique(labels):
            rows = np.array([n for n in np.flatnonzero(labels == label) if chosen[n] == TRAIN])
            order = _ranked(rows.tolist(), keys, f"{seed}|{part}")
            wanted = max(1, round(share * len(order)))
            taken = {keys[n] for n in order[:wanted]}
            for n in order:  # copies of an image follow it
                if keys[n] in taken:
                    chosen[n] = part

    if TEST not in given:
        move(TEST, test_split)
    if CALIBRATION not in given:
        move(CALIBRATION, val_split)
    if max_images:
        rows = np.array([n for n, part in enumerate(chosen) if part == TRAIN])
        kept = set(limited(labels, keys, rows, max_images, seed=seed).tolist())
        for n in rows.tolist():
            chosen[n] = TRAIN if n in kept else None
    return chosen


def _ranked(rows: list[int], keys: Sequence[str], salt: str) -> list[int]:
    """Rows in an order that their keys and ``salt`` alone decide."""
    return sorted(rows, key=lambda n: hashlib.sha256(f"{salt}|{keys[n]}".encode()).digest())


def limited(
    labels: npt.NDArray[np.int64],
    keys: Sequence[str],
    rows: npt.NDArray[np.int64],
    max_images: int,
    *,
    seed: int,
) -> npt.NDArray[np.int64]:
    """At most about ``max_images`` of ``rows``: the same share of each class, chosen by key."""
    keep = min(1.0, max_images / max(1, len(rows)))
    chosen: list[int] = []
    for label in np.unique(labels[rows]):
        order = _ranked(rows[labels[rows] == label].tolist(), keys, f"{seed}|limit")
        chosen += order[: max(1, round(keep * len(order)))]
    return np.sort(np.array(chosen, dtype=np.int64))


def manifest_of(
    names: Sequence[str],
    labels: npt.NDArray[np.int64],
    keys: Sequence[str],
    parts: Sequence[str | None],
    classes: Sequence[str],
    *,
    seed: int,
) -> Manifest:
    """The split as the core writes it down."""  # fmt: skip
    rows = [
        Entry(name, int(label), key, part)
        for name, label, key, part in zip(names, labels, keys, parts, strict=True)
        if part is not None
    ]
    return Manifest(
        kind="layout", classes=tuple(classes), fractions=(), seed=seed, entries=sorted_entries(rows)
    )


def write_split(output: Path, manifest: Manifest) -> None:
    """Write the split into the run's folder, or check that the one there is the same.

    Raises:
        DatasetError: the data are others than when the run began.
    """
    path = output / SPLIT_FILE
    if path.exists():
        before = Manifest.read(path)
        if before.hash != manifest.hash:
            raise DatasetError(
                f"the data changed since the run in {output} began: the split was "
                f"{before.hash[:12]}, is {manifest.hash[:12]}; expected the same images"
            )
        return
    manifest.write(path)


def check_parts(sets: dict[str, ImageSet], where: object) -> None:
    """Refuse a split with an empty part.

    Raises:
        DatasetError: names it.
    """
    for part in (TRAIN, CALIBRATION, TEST):
        if not len(sets[part]):
            raise DatasetError(f"{where}: no images in the {part} part, expected some")


# -- pixels ---------------------------------------------------------------------------------------


def array_keys(images: npt.NDArray[np.uint8]) -> list[str]:
    """Content keys of images in an array, of their pixels."""
    return [key_of_bytes(image.tobytes()) for image in images]


def resized(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """All images ``(N, H, W, 3)`` at ``(N, size, size, 3)``, by area."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([resize(image, (size, size), method="area") for image in images])


def with_pixels(images: ImageSet, *, image_size: int, cache: Path | None, threads: int) -> ImageSet:
    """Files as the network's loader wants them: small ones as an array, large ones from a cache.

    Args:
        cache: folder of the memory-mapped cache; None decodes the files each time (small ones
            once, into memory).

    Raises:
        DecodeError: a file that is no image; names it.
    """
    small = views.is_small(image_size)
    options: dict[str, Any] = (
        {"size": (image_size, image_size)}
        if small
        else {"short_side": views.short_side(image_size)}
    )
    if cache is None:
        if not small:
            return images
        pixels = [views.open_image(path, image_size=image_size) for path in images.paths or []]
        array = np.stack(pixels)
    else:
        store = DecodedCache.open_or_build(images, cache, threads=max(1, threads), **options)
        if not small:
            return images.with_source(store)
        array = np.stack([store.image(store.row(key)) for key in images.keys])
    return ImageSet(images.paths, images.labels, images.keys, source=array)


def unlabelled_set(
    folders: Sequence[str], *, image_size: int, cache: Path | None, threads: int
) -> ImageSet | None:
    """Images of folders in any nesting, labels unknown; None without folders.

    Raises:
        FileNotFoundError: a folder is missing or holds no image.
    """
    if not folders:
        return None
    found = list_images(folders)
    if found.bad:
        path, reason = found.bad[0]
        raise FileNotFoundError(f"dataset.unlabelled: {path}: {reason}")
    paths = found.files
    labels = np.full(len(paths), NO_LABEL)
    files = ImageSet(paths, labels, content_keys(paths, threads=max(1, threads)))
    return with_pixels(files, image_size=image_size, cache=cache, threads=threads)


def without_copies(data: Data) -> Data:
    """``data`` without the unlabelled images that it has already, held-out ones above all.

    Two images are one when their pixels at the network's size are, or, where these are not in
    memory, their files.

    Raises:
        DatasetError: nothing is left of the unlabelled images.
    """
    extra = data.unlabelled
    if extra is None:
        return data
    in_memory = extra.array is not None and all(s.array is not None for s in data.sets.values())

    def names(images: ImageSet) -> list[str]:
        return array_keys(images.array) if in_memory else [str(key) for key in images.keys]

    known = {name for images in data.sets.values() for name in names(images)}
    kept = []
    for row, name in enumerate(names(extra)):
        if name not in known:
            kept.append(row)
            known.add(name)
    if len(kept) == len(extra):
        return data
    if not kept:
        raise DatasetError(
            f"dataset.unlabelled: all {len(extra)} images are copies of labelled ones or of each "
            "other, expected others"
        )
    note = f"{len(extra) - len(kept)} unlabelled images are copies of others and left out"
    left = extra.subset(np.array(kept, dtype=np.int64))
    return replace(data, unlabelled=left, notes=(*data.notes, note))


# -- loaders --------------------------------------------------------------------------------------


class SightLoader(TorchLoader):
    """Batches as one network sees them."""

    def __init__(self, loader: BatchLoader, sight: Sight, *, device: Any) -> None:
        super().__init__(loader, Normalizer(sight.mean, sight.std, device=device))
        self.sight = sight

    def __iter__(self) -> Iterator[TorchBatch]:
        for batch in super().__iter__():
            yield batch._replace(images=self.sight.enlarged(batch.images))

    @property
    def side(self) -> int:
        """Pixels that the network sees."""
        return self.sight.side or int(self.loader.view.size[0])


def training_loader(
    data: Data,
    images: ImageSet,
    *,
    batch_size: int,
    augment: bool,
    seed: int,
    purpose: str,
    device: Any,
    threads: int,
    rank: int = 0,
    world_size: int = 1,
    view_of_epoch: Callable[[int], int] | None = None,
    view_seed: int | None = None,
    shuffle: bool = True,
    sight: Sight = PLAIN,
) -> SightLoader:
    """Shuffled batches of augmented views.

    Args:
        purpose: what the order is for; another one shuffles otherwise.
        view_of_epoch: the view's number from the epoch's, where views are replayed.
        view_seed: decides the views; ``seed`` when None.
        sight: of the network that sees the batches.
    """  # fmt: skip
    view = views.train_view(
        data.image_size, augment=augment, mirror=data.mirror, crop=data.crop,
        seed=seed if view_seed is None else view_seed,
    )  # fmt: skip
    order = EpochOrder(
        len(images), seed=derive_seed(seed, purpose) % 2**31, shuffle=shuffle, rank=rank,
        world_size=world_size, uneven="wrap" if shuffle else "keep",
    )  # fmt: skip
    loader = BatchLoader(
        images, view=view, batch_size=batch_size, order=order, threads=threads,
        view_of_epoch=view_of_epoch,
    )  # fmt: skip
    return SightLoader(loader, sight, device=device)


def evaluation_loader(
    data: Data,
    images: ImageSet,
    *,
    batch_size: int,
    device: Any,
    threads: int,
    rank: int = 0,
    world_size: int = 1,
    sight: Sight = PLAIN,
) -> SightLoader:
    """Every image once, in order, as inference sees it."""  # fmt: skip
    view: Any = views.eval_view(data.image_size, whole=data.whole)
    if images.array is not None and data.small:
        view = views.small_eval_view(data.image_size)
    order = EpochOrder(len(images), shuffle=False, rank=rank, world_size=world_size)
    loader = BatchLoader(images, view=view, batch_size=batch_size, order=order, threads=threads)
    return SightLoader(loader, sight, device=device)
