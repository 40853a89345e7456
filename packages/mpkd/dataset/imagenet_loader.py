"""ImageNet in torchvision's layout: train/<WordNet id>/ and val/<WordNet id>/."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN, divide, manifest_of
from shared_core.datasets import DatasetError, ImageSet, Manifest, scan
from shared_core.datasets.finding.fingerprint import key_of_bytes

CLASSES = 1000
IMAGES = 1_331_167


def path_key(root: Path, path: Path) -> str:
    """What names an image: its path below the root and its size in bytes.

    Hashing the contents would read 140 GB before the first step.
    """
    return key_of_bytes(f"{path.relative_to(root).as_posix()}|{path.stat().st_size}".encode())


def imagenet_sets(
    root: str | Path, *, val_split: float, seed: int, max_images: int
) -> tuple[dict[str, ImageSet], Manifest]:
    """Train, calibration (``val_split`` of train, by hash) and test (the ``val`` folder).

    The published comparison is on the validation images, so nothing may be chosen on them.

    Raises:
        DatasetNotFoundError, DatasetError: no such folder, or another layout.
    """
    listing = scan(root)
    present = {sample.split for sample in listing.samples}
    if listing.layout != "split" or not {"train", "val"} <= present:
        raise DatasetError(
            f"{root}: expected train/<class>/*.JPEG and val/<class>/*.JPEG, as torchvision has it"
        )
    samples = [s for s in listing.samples if s.split in ("train", "val")]
    keys = [path_key(listing.root, sample.path) for sample in samples]
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    parts = divide(
        labels, keys, [TRAIN if s.split == "train" else TEST for s in samples],
        val_split=val_split, test_split=0.0, seed=seed, max_images=max_images,
    )  # fmt: skip
    names = [listing.relative(sample) for sample in samples]
    manifest = manifest_of(names, labels, keys, parts, listing.classes, seed=seed)
    sets = {}
    for part in (TRAIN, CALIBRATION, TEST):
        rows = [n for n, given in enumerate(parts) if given == part]
        sets[part] = ImageSet(
            [samples[n].path for n in rows], labels[rows], [keys[n] for n in rows]
        )
    return sets, manifest
