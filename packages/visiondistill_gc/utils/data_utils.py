"""From a folder of classes to a held-out test part, K folds, and loaders that decode as they go."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_core import datasets
from shared_core.datasets import DatasetError, ImageSet
from shared_core.datasets.splitting.manifest import Entry
from shared_core.datasets.splitting.prepared import VERIFY_FILE, PreparedData, prepare_data
from shared_core.runs import derive_seed
from shared_core.runs.json_files import write_json
from visiondistill_gc.options import DataOptions, Settings
from visiondistill_gc.utils.folds import Matcher, group_matcher, group_names, make_folds
from visiondistill_gc.utils.listed import FOLDER, lay_out
from visiondistill_gc.utils.transforms import GarbageView, eval_view

FOLDS_FILE, CACHE_FOLDER = "folds.json", "decoded"
EVAL_BATCH = 64
NO_FOLD = -2  # no row's fold
PARTS_OF_ONE = 10  # a single student is validated on a tenth, where no part is there for it


@dataclass(frozen=True)
class GarbageData:
    """The images of a run.

    Attributes:
        prepared: the verified set and its written-down split.
        input_size: side of the network's input, pixels.
        entries: the samples that the folds divide, in the order of ``images``.
        images: their pixels.
        folds: the fold in which each of them is validated, ``(N,)``. A single student has fold 0,
            and -1 for what it learns from.
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

    def train_rows(self, fold: int | None) -> np.ndarray:
        """Rows of ``images`` that fold ``fold`` learns from; None: all."""
        return np.flatnonzero(self.folds != (NO_FOLD if fold is None else fold))

    def validation_rows(self, fold: int | None) -> np.ndarray:
        """Rows of ``images`` that fold ``fold`` is validated on; None: none."""
        return np.flatnonzero(self.folds == (NO_FOLD if fold is None else fold))

    def facts(self) -> dict[str, Any]:
        """What a record says of the data."""
        return self.prepared.facts(self.input_size)


def prepare(settings: Settings, output: Path) -> GarbageData:
    """Find or draw the images, look at every file once, split and fold them, write it all down.

    Files that cannot be read are listed in ``quarantine.txt`` and left out.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, other classes, or changed folds.
    """
    options, matcher = settings.data, group_matcher(settings.data.group_pattern)
    prepared = _prepared(settings, output, matcher)
    if options.categories and sorted(options.categories) != sorted(prepared.classes):
        raise DatasetError(
            f"--categories {' '.join(options.categories)}: expected the class folders of "
            f"{prepared.root}: {' '.join(prepared.classes)}"
        )
    if options.group_pattern and all(matcher(e.path) is None for e in prepared.manifest.entries):
        raise DatasetError(f"--group-pattern {options.group_pattern} matches no file's name")
    held = [e for e in prepared.manifest.entries if e.split == "test"]
    entries = _entries(options, prepared)
    near = _near_copies(output / VERIFY_FILE) if options.group_by == "near" else []
    groups = group_names(entries, root=prepared.root, near=near, matcher=matcher)
    folds = _folds(options, entries, groups)
    _write_folds(output / FOLDS_FILE, entries, folds)
    images, test = (_images(part, prepared.root) for part in (entries, held))
    if options.decoded_cache:
        size = (options.cache_size, options.cache_size) if options.cache_size else None
        cache = datasets.DecodedCache.open_or_build(
            _images((*entries, *held), prepared.root),
            output / CACHE_FOLDER,
            size=size,
            threads=max(1, options.workers),
        )
        images, test = images.with_source(cache), test.with_source(cache)
    return GarbageData(
        prepared,
        options.input_size,
        entries,
        images,
        folds,
        test if held else None,
        len(set(groups)),
    )


def _entries(options: DataOptions, prepared: PreparedData) -> tuple[Entry, ...]:
    """The samples to learn from and to validate on.

    A manifest's calibration part is there to choose on, so no fold learns from it.
    """
    parts = ["train"]
    if options.split is None or options.n_splits == 1:
        parts.append("calibration")
    return tuple(e for e in prepared.manifest.entries if e.split in parts)


def _folds(options: DataOptions, entries: Sequence[Entry], groups: Sequence[str]) -> np.ndarray:
    """The fold of each sample; a single student is validated on the calibration part."""
    chosen = np.array([e.split == "calibration" for e in entries])
    if options.n_splits == 1 and chosen.any():
        return np.where(chosen, 0, -1)
    folds = make_folds(
        [e.label for e in entries],
        groups,
        folds=PARTS_OF_ONE if options.n_splits == 1 else options.n_splits,
        seed=options.split_seed,
        kind=options.kfold,
    )
    return folds if options.n_splits > 1 else np.where(folds == 0, 0, -1)


def _prepared(settings: Settings, output: Path, matcher: Matcher) -> PreparedData:
    """The images and their held-out part; copies and groups lie whole on one side of it."""
    options, test = settings.data, settings.data.test_share
    known = options.data_path is not None and options.data_set in datasets.names()
    fractions = [("train", 1.0 - test), ("test", test)] if test else [("train", 1.0)]
    if options.n_splits == 1 and test:
        fractions = [("train", 1.0 - 2 * test), ("calibration", test), ("test", test)]
    root = options.data_path
    if options.train_list is not None and root is not None:
        lists = {"train": options.train_list, "val": options.val_list, "test": options.test_list}
        root = lay_out(lists, options.label_list, root, output / FOLDER)
    return prepare_data(
        output,
        root=root,
        name=options.data_set if options.data_path else None,
        spec=datasets.get(options.data_set) if known else None,
        num_classes=options.num_classes,
        fractions=fractions,
        split_seed=options.split_seed,
        quarantine=options.quarantine,
        workers=options.workers,
        scenes={
            "num_classes": options.builtin_classes,
            "image_size": options.input_size,
            "images_per_class": options.builtin_images,
            "seed": derive_seed(settings.run.seed, "scenes") % 2**31,
        },
        groups=matcher,
        split=options.split,
    )


def _images(entries: Sequence[Entry], root: Path) -> ImageSet:
    return ImageSet.from_rows([(e.path, e.label, e.key) for e in entries], root=root)


def _near_copies(path: Path) -> list[list[str]]:
    """Groups of paths of nearly the same picture, as the check of the files found them."""
    if not path.is_file():  # the split was made elsewhere, exact copies are known all the same
        return []
    return json.loads(path.read_text(encoding="utf-8")).get("duplicates_near", [])


def _write_folds(path: Path, entries: Sequence[Entry], folds: np.ndarray) -> None:
    table = {entry.path: int(fold) for entry, fold in zip(entries, folds, strict=True)}
    if not path.exists():
        write_json(path, table)
    elif json.loads(path.read_text(encoding="utf-8")) != table:
        raise DatasetError(f"{path} holds other folds than this run makes: it was changed")


def train_view(settings: Settings, *, seed: int) -> GarbageView:
    """The training view that the options describe."""
    view = settings.view
    return GarbageView(
        settings.data.input_size,
        hflip=view.hflip,
        vflip=view.vflip,
        rotation=view.rotation,
        padding=view.crop_padding,
        jitter=view.jitter,
        erasing=view.erasing,
        crop_scale=view.crop_scale,
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
