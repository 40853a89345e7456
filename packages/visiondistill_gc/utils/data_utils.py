"""From a folder of classes to a held-out test part, K folds, and loaders that decode as they go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_core import datasets
from shared_core.checkpoints import atomic_write
from shared_core.datasets import DatasetError, ImageSet
from shared_core.datasets.splitting.manifest import Entry
from shared_core.datasets.splitting.prepared import VERIFY_FILE, PreparedData, prepare_data
from shared_core.runs import derive_seed
from visiondistill_gc.utils.folds import group_names, make_folds
from visiondistill_gc.utils.transforms import GarbageView, eval_view

FOLDS_FILE, CACHE_FOLDER = "folds.json", "decoded"
EVAL_BATCH = 64


@dataclass(frozen=True)
class GarbageData:
    """The images of a run.

    Attributes:
        prepared: the verified set and its written-down split.
        input_size: side of the network's input, pixels.
        entries: the samples that the folds divide, in the order of ``images``.
        images: their pixels.
        folds: the fold in which each of them is validated, ``(N,)``.
        test: images that no fold sees; None without such a part.
        groups: how many groups of copies the folds kept together (a single image is one).
    """

    prepared: PreparedData
    input_size: int
    entries: tuple[Entry, ...]
    images: ImageSet
    folds: np.ndarray
    test: ImageSet | None
    groups: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.prepared.classes

    def train_rows(self, fold: int) -> np.ndarray:
        """Rows of ``images`` that fold ``fold`` learns from."""
        return np.flatnonzero(self.folds != fold)

    def validation_rows(self, fold: int) -> np.ndarray:
        """Rows of ``images`` that fold ``fold`` is validated on."""
        return np.flatnonzero(self.folds == fold)

    def facts(self) -> dict[str, Any]:
        """What a record says of the data."""
        return self.prepared.facts(self.input_size)


def prepare(args: argparse.Namespace, output: Path) -> GarbageData:
    """Find or draw the images, look at every file once, split and fold them, write it all down.

    Files that cannot be read are listed in ``quarantine.txt`` and left out.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, other classes, or changed folds.
    """
    known = args.data_path is not None and args.data_set in datasets.names()
    test = args.test_share
    prepared = prepare_data(
        output,
        root=args.data_path,
        name=args.data_set if args.data_path else None,
        spec=datasets.get(args.data_set) if known else None,
        num_classes=args.num_classes,
        fractions=(("train", 1.0 - test), ("test", test)) if test else (("train", 1.0),),
        split_seed=args.split_seed,
        quarantine=args.quarantine,
        workers=args.num_workers,
        scenes={
            "num_classes": args.builtin_classes,
            "image_size": args.input_size,
            "images_per_class": args.builtin_images,
            "seed": derive_seed(args.seed, "scenes") % 2**31,
        },
    )
    if args.categories and sorted(args.categories) != sorted(prepared.classes):
        raise DatasetError(
            f"--categories {' '.join(args.categories)}: expected the class folders of "
            f"{prepared.root}: {' '.join(prepared.classes)}"
        )
    entries = tuple(e for e in prepared.manifest.entries if e.split != "test")
    duplicates = _near_copies(output / VERIFY_FILE) if args.group_by == "near" else []
    groups = group_names(entries, duplicates=duplicates, pattern=args.group_pattern)
    folds = make_folds(
        [e.label for e in entries],
        groups,
        folds=args.n_splits,
        seed=args.split_seed,
        kind=args.kfold,
    )
    _write_folds(output / FOLDS_FILE, entries, folds)
    images = ImageSet.from_rows([(e.path, e.label, e.key) for e in entries], root=prepared.root)
    held = [e for e in prepared.manifest.entries if e.split == "test"]
    test_images = None
    if held:
        test_images = ImageSet.from_rows(
            [(e.path, e.label, e.key) for e in held], root=prepared.root
        )
    if args.decoded_cache:
        both = ImageSet.from_rows(
            [(e.path, e.label, e.key) for e in (*entries, *held)], root=prepared.root
        )
        size = (args.cache_size, args.cache_size) if args.cache_size else None
        cache = datasets.DecodedCache.open_or_build(
            both, output / CACHE_FOLDER, size=size, threads=max(1, args.num_workers)
        )
        images = images.with_source(cache)
        test_images = None if test_images is None else test_images.with_source(cache)
    return GarbageData(
        prepared, args.input_size, entries, images, folds, test_images, len(set(groups))
    )


def _near_copies(path: Path) -> list[list[str]]:
    """Groups of paths of nearly the same picture, as the check of the files found them."""
    if not path.is_file():  # the split was made elsewhere, exact copies are known all the same
        return []
    return json.loads(path.read_text(encoding="utf-8")).get("duplicates_near", [])


def _write_folds(path: Path, entries: Sequence[Entry], folds: np.ndarray) -> None:
    table = {entry.path: int(fold) for entry, fold in zip(entries, folds, strict=True)}
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != table:
            raise DatasetError(f"{path} holds other folds than this run makes: it was changed")
        return
    text = json.dumps(table, indent=0) + "\n"
    atomic_write(path, lambda target: target.write_text(text, encoding="utf-8"))


def train_view(args: argparse.Namespace, *, seed: int) -> GarbageView:
    """The training view that the options describe."""
    return GarbageView(
        args.input_size,
        hflip=args.hflip,
        vflip=args.vflip,
        rotation=args.rotation,
        padding=args.crop_padding,
        jitter=args.jitter,
        erasing=args.erasing,
        crop_scale=args.crop_scale,
        seed=seed,
    )


def train_loader(
    images: ImageSet,
    *,
    view: GarbageView,
    batch_size: int,
    order_seed: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    views: int | None = None,
) -> datasets.BatchLoader:
    """Shuffled batches of augmented views; the last incomplete batch is left out.

    Args:
        images: the training part.
        batch_size: of this process.
        views: replay this many views in turn; None draws a new one every epoch.

    Raises:
        DatasetError: not one whole batch.
    """
    share = len(images) // world_size
    if share < batch_size:
        raise DatasetError(
            f"{share} training images make no batch of {batch_size}: expected at least as many"
        )
    order = datasets.EpochOrder(
        len(images), seed=order_seed, rank=rank, world_size=world_size, uneven="drop"
    )
    number: Callable[[int], int] | None = None
    if views:
        number = lambda epoch: epoch % views  # noqa: E731
    return datasets.BatchLoader(
        images,
        view=view,
        batch_size=batch_size,
        order=order,
        threads=workers,
        drop_last=True,
        view_of_epoch=number,
    )


def eval_loader(
    images: ImageSet, input_size: int, *, workers: int, batch_size: int = EVAL_BATCH
) -> datasets.BatchLoader:
    """Every image once, in order, as inference sees it."""
    return datasets.BatchLoader(
        images, view=eval_view(input_size), batch_size=batch_size, threads=workers
    )
