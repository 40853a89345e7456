"""The images: ``train``, ``val`` and ``test`` folders, checked, with a name for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_core.datasets import ImageSet
from shared_core.datasets.splitting.prepared import PreparedData, prepare_data
from shared_core.runs import UsageError, derive_seed
from torch_cls_zoo.dataloader import PARTS

# What the command calls a part, and what the split calls it.
SPLITS = dict(zip(PARTS, ("train", "calibration", "test"), strict=True))
BUILTIN = "builtin"


@dataclass(frozen=True)
class Part:
    """The images of one part, with their names below the data folder."""

    name: str  # train, val or test
    images: ImageSet
    paths: tuple[str, ...]  # relative to the data folder, with "/", in the order of the images

    def __len__(self) -> int:
        return len(self.paths)


def open_data(
    data: str,
    output: Path,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    workers: int = 0,
    quarantine: Path | None = None,
    split: Path | None = None,
    image_side: int = 64,
) -> PreparedData:
    """Find the images, look at each once, and write the split down in ``output``.

    Args:
        data: a folder of train, val and test folders, or of class folders (then split by hash);
            ``builtin`` draws scenes into ``output``.
        output: where the split, the findings and drawn scenes go; a split there is read again.
        num_classes: refuse another number of class folders; how many are drawn.
        seed: of the split by hash and of drawn scenes.
        workers: processes that check the files.
        quarantine: a list of files to leave out; ``quarantine.txt`` in the data folder otherwise.
        split: a manifest that says which image is in which part.
        image_side: of drawn scenes, pixels.

    Raises:
        FileNotFoundError, DatasetError: no images, too few, other classes than expected.
    """
    output.mkdir(parents=True, exist_ok=True)
    if data == BUILTIN:
        scenes = {
            "num_classes": num_classes or 4,
            "image_size": max(16, image_side),
            "images_per_class": 60,
            "seed": derive_seed(seed, "scenes") % 2**31,
        }
        return prepare_data(
            output, root=None, scenes=scenes, num_classes=num_classes, split_seed=seed, split=split
        )
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"--data {data}: no such folder; expected train, val and test folders with one folder "
            f"a class, or {BUILTIN!r} for drawn scenes"
        )
    return prepare_data(
        output,
        root=root,
        num_classes=num_classes,
        split_seed=seed,
        workers=workers,
        quarantine=quarantine,
        split=split,
    )


def part(data: PreparedData, name: str) -> Part:
    """One part of the data.

    Raises:
        UsageError: an unknown name.
        DatasetError: the data has no such part.
    """
    if name not in SPLITS:
        raise UsageError(f"part is {name!r}, expected one of {', '.join(SPLITS)}")
    items = data.manifest.subset(SPLITS[name])
    return Part(name, data.image_set(SPLITS[name]), tuple(item.path for item in items))


def check_classes(found: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Refuse classes other than those a model was trained on.

    Raises:
        ValueError: another number, or the first name that differs.
    """
    if len(found) != len(wanted):
        raise ValueError(f"{where} knows {len(wanted)} classes, the data has {len(found)}")
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        if mine != theirs:
            raise ValueError(f"class {number} is {mine!r} in the data, {theirs!r} in {where}")
