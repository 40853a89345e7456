"""Which data a configuration names, where they lie, and how each becomes :class:`Data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpkd.dataset import cifar10, data_utils, views
from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN, Data
from mpkd.dataset.imagenet_loader import CLASSES, IMAGES, imagenet_sets
from shared_core.datasets import ImageSet, digits, find, get, prepare_data, scan
from shared_core.datasets.finding.fingerprint import content_keys
from shared_core.datasets.finding.unpack import Limits, unpack
from shared_core.runs import UsageError

CIFAR_IMAGES = 60_000
DIGITS_SIDE = 32  # pixels, where none are asked for
ARCHIVES = ("CIFAR10.zip", "cifar10.zip", "CIFAR-10.zip", "cifar-10-python.tar.gz")
TEST_SPLIT = 0.2  # of sets without a test part
SPLIT_SEED = 0  # the split is part of the data: seeds of a run do not move it
SCENES = {"num_classes": 6, "image_size": 32, "images_per_class": 80, "seed": 0}


def find_cifar10(folder: str, data_root: Path | None, output: Path) -> Path:
    """The folder of CIFAR-10, unpacked into ``output`` when only an archive is there.

    Args:
        folder: ``dataset.data_dir_cifar10``: a folder, a zip or a tar.
        data_root: a folder that holds it under one of its names; looked at first.

    Raises:
        FileNotFoundError: one line with all the places that were expected.
    """
    places = [Path(folder)]
    if data_root is not None:
        named = find(data_root, get("CIFAR-10"))
        places[:0] = [
            *([named] if named else []), data_root / "cifar-10-batches-py",
            *(data_root / name for name in ARCHIVES),
        ]  # fmt: skip
    for place in places:
        if place.is_file():
            place = unpack(place, output / "data" / "cifar10", limits=Limits())
        if place.is_dir():
            inner = place / "cifar-10-batches-py"
            return inner if cifar10.is_batches(inner) else place
    shown = f"{data_root}/CIFAR10 or " if data_root is not None else ""
    raise FileNotFoundError(
        f"CIFAR-10 is not at {shown}{folder}: expected train/ and test/ with class folders, "
        "cifar-10-batches-py, or a zip of either (https://www.cs.toronto.edu/~kriz/cifar.html); "
        "--scale rehearsal needs no data"
    )


def load_data(config: Mapping[str, Any], output: str | Path, *, data_root: Path | None) -> Data:
    """Find, split and prepare what ``dataset.*`` names.

    Args:
        config: values by dotted key.
        output: the run's folder; the split and the cache are written there.
        data_root: a folder that holds data sets by name.

    Raises:
        FileNotFoundError, DatasetError, UsageError: no data, unfit ones, or settings that
            contradict them.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    make = {
        "cifar10": _cifar10, "imagenet": _imagenet, "folder": _folder, "digits": _digits,
        "builtin": _builtin,
    }[config["dataset.name"]]  # fmt: skip
    data = make(config, output, data_root)
    wanted = config["model.num_classes"]
    if wanted and wanted != len(data.classes):
        raise UsageError(f"model.num_classes is {wanted}, {data.name} has {len(data.classes)}")
    data_utils.check_parts(data.sets, data.name)
    return data_utils.without_copies(replace(data, crop=config["dataset.crop"]))


def cache_folder(config: Mapping[str, Any], output: Path, name: str) -> Path | None:
    """Where a part's cache lies: below ``dataset.cache.dir`` in the run's folder."""
    if not config["dataset.cache.enabled"]:
        return None
    return output / config["dataset.cache.dir"] / name


def _unlabelled(config: Mapping[str, Any], output: Path, size: int) -> ImageSet | None:
    return data_utils.unlabelled_set(
        config["dataset.unlabelled"], image_size=size, threads=config["dataset.workers"],
        cache=cache_folder(config, output, "unlabelled"),
    )  # fmt: skip


def _from_arrays(
    config: Mapping[str, Any],
    output: Path,
    *,
    name: str,
    kind: str,
    size: int,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    keys: list[str],
    parts: list[str | None],
    names: list[str],
    classes: tuple[str, ...],
    mirror: bool = True,
    notes: tuple[str, ...] = (),
) -> Data:
    """Split what is in memory."""  # fmt: skip
    chosen = data_utils.divide(
        labels, keys, parts, val_split=config["dataset.val_split"], test_split=TEST_SPLIT,
        seed=SPLIT_SEED, max_images=config["dataset.max_images"],
    )  # fmt: skip
    manifest = data_utils.manifest_of(names, labels, keys, chosen, classes, seed=SPLIT_SEED)
    data_utils.write_split(output, manifest)
    sets = {}
    for part in (TRAIN, CALIBRATION, TEST):
        rows = np.array([n for n, given in enumerate(chosen) if given == part], dtype=np.int64)
        sets[part] = ImageSet(None, labels[rows], [keys[n] for n in rows], source=images[rows])
    if None in chosen and kind == "real":
        kind = "subset"
    unlabelled = _unlabelled(config, output, images.shape[1])
    return Data(name, kind, classes, size, manifest.hash, sets, unlabelled, mirror, notes)


def _cifar10(config: Mapping[str, Any], output: Path, data_root: Path | None) -> Data:
    folder = find_cifar10(config["dataset.data_dir_cifar10"], data_root, output)
    size = int(config["dataset.image_size"] or cifar10.SIDE)
    stored = size if views.is_small(size) else cifar10.SIDE  # larger ones are enlarged in the view
    if cifar10.is_batches(folder):
        found = cifar10.read_batches(folder)
        images, labels, classes = found.images, found.labels, found.classes
        parts, names = list(found.parts), list(found.names)
        keys = data_utils.array_keys(images)
        images = data_utils.resized(images, stored)
    else:
        listing = scan(folder)
        if listing.layout != "split":
            raise FileNotFoundError(f"{folder}: expected train/ and test/ with class folders")
        classes, threads = listing.classes, config["dataset.workers"]
        paths = [sample.path for sample in listing.samples]
        keys = content_keys(paths, threads=max(1, threads))
        labels = np.array([sample.label for sample in listing.samples], dtype=np.int64)
        names = [listing.relative(sample) for sample in listing.samples]
        to_part = {"train": TRAIN, "val": CALIBRATION, "test": TEST}
        parts = [to_part[str(sample.split)] for sample in listing.samples]
        pixels = data_utils.with_pixels(
            ImageSet(paths, labels, keys), image_size=stored, threads=threads,
            cache=cache_folder(config, output, "cifar10"),
        )  # fmt: skip
        images = pixels.array  # type: ignore[assignment]  # small images are an array
    kind = "real" if len(labels) == CIFAR_IMAGES else "subset"
    made = _from_arrays(
        config, output, name="CIFAR-10", kind=kind, size=size, images=images, labels=labels,
        keys=keys, parts=parts, names=names, classes=classes,
    )  # fmt: skip
    return replace(made, whole=stored != size)


def _digits(config: Mapping[str, Any], output: Path, data_root: Path | None) -> Data:
    size = int(config["dataset.image_size"] or DIGITS_SIDE)
    if not views.is_small(size):
        raise UsageError(
            f"dataset.image_size is {size}, expected at most {views.SMALL} for digits; "
            "model.teacher_size lets a teacher see more"
        )
    images, labels = digits(size=size)
    names = [f"digits/{n:04d}" for n in range(len(labels))]
    return _from_arrays(
        config, output, name="digits", kind="built-in", size=size, images=images, labels=labels,
        keys=data_utils.array_keys(images), parts=[None] * len(labels), names=names,
        classes=tuple(str(n) for n in range(10)), mirror=False,
    )  # fmt: skip


def _imagenet(config: Mapping[str, Any], output: Path, data_root: Path | None) -> Data:
    folder = find(data_root, get("ImageNet-1k")) if data_root is not None else None
    folder = folder or Path(config["dataset.data_dir_imagenet"])
    if not folder.is_dir():
        raise FileNotFoundError(
            f"ImageNet is not at {folder}: expected train/<class>/*.JPEG and val/<class>/*.JPEG; "
            "set dataset.data_dir_imagenet or --data-root; --scale rehearsal needs no data"
        )
    size = int(config["dataset.image_size"] or 224)
    sets, manifest = imagenet_sets(
        folder, val_split=config["dataset.val_split"], seed=SPLIT_SEED,
        max_images=config["dataset.max_images"],
    )  # fmt: skip
    data_utils.write_split(output, manifest)
    total = sum(len(images) for images in sets.values())
    published = total == IMAGES and len(manifest.classes) == CLASSES
    return Data(
        "ImageNet-1k", "real" if published else "subset", manifest.classes, size, manifest.hash,
        _pixels(config, output, sets, size), _unlabelled(config, output, size),
    )  # fmt: skip


def _pixels(
    config: Mapping[str, Any], output: Path, sets: dict[str, ImageSet], size: int
) -> dict[str, ImageSet]:
    return {
        part: data_utils.with_pixels(
            images, image_size=size, cache=cache_folder(config, output, part),
            threads=config["dataset.workers"],
        )
        for part, images in sets.items()
    }  # fmt: skip


def _prepared(
    config: Mapping[str, Any], output: Path, root: Path | None, scenes: dict[str, int] | None
) -> Data:
    """Through the core: every file looked at, copies kept together, the split written down."""
    val = config["dataset.val_split"]
    prepared = prepare_data(
        output, root=root, scenes=scenes, split_seed=SPLIT_SEED,
        fractions=((TRAIN, 1 - TEST_SPLIT - val), (CALIBRATION, val), (TEST, TEST_SPLIT)),
        split=config["dataset.split"] or None,
    )  # fmt: skip
    size = int(config["dataset.image_size"] or min(224, prepared.image_side()))
    sets = {part: prepared.image_set(part) for part in (TRAIN, CALIBRATION, TEST)}
    kind, limit = prepared.kind, config["dataset.max_images"]
    if limit and limit < len(sets[TRAIN]):
        train = sets[TRAIN]
        keys = [str(key) for key in train.keys]
        rows = np.arange(len(train))
        sets[TRAIN] = train.subset(
            data_utils.limited(train.labels, keys, rows, limit, seed=SPLIT_SEED)
        )
        kind = "subset" if kind == "real" else kind
    return Data(
        prepared.name, kind, tuple(prepared.classes), size, prepared.manifest.hash,
        _pixels(config, output, sets, size), _unlabelled(config, output, size),
        notes=prepared.notes,
    )  # fmt: skip


def _folder(config: Mapping[str, Any], output: Path, data_root: Path | None) -> Data:
    root = Path(config["dataset.data_dir_folder"])
    if data_root is not None and not root.is_dir():
        root = data_root / root
    if not root.is_dir():
        raise FileNotFoundError(f"dataset.data_dir_folder: {root} is no folder of class folders")
    return _prepared(config, output, root, None)


def _builtin(config: Mapping[str, Any], output: Path, data_root: Path | None) -> Data:
    size = int(config["dataset.image_size"] or SCENES["image_size"])
    return _prepared(config, output, None, {**SCENES, "image_size": max(16, size)})
