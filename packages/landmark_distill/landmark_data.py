"""The images of a run: from lists, from folders, or drawn; checked, set apart, written down."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landmark_distill.file_lists import joined_labels, read_list, read_remap, remapped
from landmark_distill.landmark_scenes import is_drawn, make_landmark_scenes
from landmark_distill.masks import Truth, read_truth
from landmark_distill.two_level import (
    HoldOut,
    LabelledPart,
    part_of,
    scan_levels,
    split_levels,
)
from shared_core.datasets import (
    DatasetError,
    ImageSet,
    Listing,
    Manifest,
    write_quarantine,
)
from shared_core.datasets.finding.fingerprint import content_keys
from shared_core.datasets.finding.verify import verify

SPLIT_FILE, VERIFY_FILE, QUARANTINE_FILE = "split.json", "verify.json", "quarantine.txt"


@dataclass(frozen=True)
class LandmarkData:
    """What a run learns from and is tested on.

    Attributes:
        name, kind: as records have them; the kind is ``real`` or ``built-in``.
        train: images with the head's class numbers; None for a test alone.
        calibration: images of the same classes, which choose the best epoch; likewise.
        test: images of the open-set test, and the two truths of its pairs.
        class_names: of the head's rows; empty when the lists have numbers only.
        num_classes: rows that a new head needs.
        split_hash: of what lies where.
        notes: what a reader of results should know.
    """

    name: str
    kind: str
    train: ImageSet | None
    calibration: ImageSet | None
    test: ImageSet
    coarse: Truth
    fine: Truth
    class_names: tuple[str, ...]
    num_classes: int
    split_hash: str
    notes: tuple[str, ...] = ()

    @property
    def rehearsal(self) -> bool:
        """Whether the images were drawn by the program."""
        return self.kind == "built-in"

    def facts(self, pixels: int) -> dict[str, Any]:
        """What a record says of the data; ``pixels`` is the side of the network's input."""
        splits = {
            name: len(part)
            for name, part in (
                ("train", self.train),
                ("calibration", self.calibration),
                ("test", self.test),
            )
            if part is not None
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "images": sum(splits.values()),
            "pixels": pixels,
            "split_hash": self.split_hash,
            "splits": splits,
            "classes": self.num_classes,
            "notes": list(self.notes),
        }


def prepare_landmarks(args: argparse.Namespace, folder: Path) -> LandmarkData:
    """The images that the options name; what was found out about them lies in ``folder``.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, or lists that do not fit together.
    """
    if args.data_kind == "list":
        return _from_lists(args)
    return _from_folder(args, folder)


# -- folders and drawn scenes ---------------------------------------------------------------------


def _from_folder(args: argparse.Namespace, folder: Path) -> LandmarkData:
    root = args.data_path
    if args.data_kind == "builtin":
        root = make_landmark_scenes(
            folder / "data" / "scenes",
            num_classes=args.builtin_classes,
            image_size=max(args.image_size, 16),
            images_per_class=args.builtin_images,
            seed=args.split_seed,
        )
    drawn = is_drawn(root)
    split_file = args.split_file or folder / SPLIT_FILE
    if split_file.exists():
        manifest = Manifest.read(split_file, root=root)
        names = manifest.classes
        coarse_of = {name: name.split("/")[0] for name in names}
    else:
        listing, coarse = scan_levels(root, layout=args.layout)
        coarse_of = dict(zip(listing.classes, coarse, strict=True))
        manifest = make_landmark_split(args, folder, listing, coarse)
        manifest.write(split_file)
    learned = {entry.label for entry in manifest.entries if entry.split == "train"}
    if len(learned) < 2:
        raise DatasetError(f"{root}: {len(learned)} classes to learn from, expected two")
    classes = tuple(manifest.classes[label] for label in sorted(learned))

    def part(name: str, names: tuple[str, ...] | None = None) -> LabelledPart:
        return part_of(manifest, root, name, coarse_of=coarse_of.__getitem__, classes=names)

    test = part(args.test_part)
    return LandmarkData(
        name="built-in scenes" if drawn else Path(args.data_path).resolve().name,
        kind="built-in" if drawn else "real",
        train=None if args.test_only else part("train", classes).images,
        calibration=None if args.test_only else part("calibration", classes).images,
        test=test.images,
        coarse=test.coarse,
        fine=test.fine,
        class_names=classes,
        num_classes=_rows(args, len(classes)),
        split_hash=manifest.hash,
        notes=manifest.notes,
    )


def make_landmark_split(
    args: argparse.Namespace, folder: Path, listing: Listing, coarse: tuple[str, ...]
) -> Manifest:
    """Look at every file once, leave out what cannot be read, and set classes apart."""
    report = verify(listing, near=False, workers=0)
    report.write(folder / VERIFY_FILE)
    quarantine = report.quarantine()
    if quarantine:
        write_quarantine(folder / QUARANTINE_FILE, quarantine)
        path, reason = next(iter(quarantine.items()))
        print(
            f"left out {len(quarantine)} files ({path}: {reason}); all are in "
            f"{folder / QUARANTINE_FILE}",
            file=sys.stderr,
        )
    return split_levels(
        listing,
        coarse,
        keys=report.keys,
        hold_out=HoldOut(
            test=args.test_share,
            validation=args.validation_share,
            calibration=args.calibration_share,
            test_groups=args.test_groups,
            validation_groups=args.validation_groups,
            seed=args.split_seed,
        ),
        quarantine=quarantine,
    )


def _rows(args: argparse.Namespace, needed: int) -> int:
    """Rows of the head: as many as asked for, and at least as many as there are labels."""
    if args.num_classes is None:
        return needed
    if args.num_classes < needed:
        raise DatasetError(
            f"--num_classes {args.num_classes}, the labels go up to {needed - 1}: expected at "
            f"least {needed}"
        )
    return int(args.num_classes)


# -- lists ----------------------------------------------------------------------------------------


def _from_lists(args: argparse.Namespace) -> LandmarkData:
    remap = read_remap(args.remap) if args.remap else None
    train = calibration = None
    needed, said = 1, []
    digest = hashlib.sha256()
    if not args.test_only:
        lists = [
            read_list(path, root)
            for path, root in zip(args.train_list, args.train_root, strict=True)
        ]
        labels, needed = joined_labels(lists, remap=remap)
        train = _image_set([path for one in lists for path in one.paths], labels, args)
        chosen = read_list(args.val_list, args.val_root)
        # Its labels are those of the first training list; the original forgot the map here.
        mapped = remapped(chosen.labels, remap)
        if mapped.max() >= needed:
            raise DatasetError(
                f"{args.val_list}: label {int(chosen.labels[mapped.argmax()])} is none of the "
                f"{needed} classes that are learned"
            )
        calibration = _image_set(list(chosen.paths), mapped, args)
        said.append(f"{len(lists)} training lists, {len(train)} images")
        for part in (train, calibration):
            digest.update(repr((part.keys, part.labels.tolist())).encode())
    tested = read_list(args.test_list, args.test_root)
    test = _image_set(list(tested.paths), tested.labels, args)
    digest.update(repr((test.keys, test.labels.tolist())).encode())
    truths = {
        name: read_truth(getattr(args, f"{name}_mask"), len(test))
        if getattr(args, f"{name}_mask")
        else tested.labels
        for name in ("coarse", "fine")
    }
    return LandmarkData(
        name=args.dataset,
        kind="real",
        train=train,
        calibration=calibration,
        test=test,
        coarse=truths["coarse"],
        fine=truths["fine"],
        class_names=(),
        num_classes=_rows(args, needed),
        split_hash=digest.hexdigest(),
        notes=tuple(said),
    )


def _image_set(paths: list[Path], labels: np.ndarray, args: argparse.Namespace) -> ImageSet:
    """Images with content keys, which replayed views and stored knowledge are found by."""
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"{missing}: an image of the list is not there")
    return ImageSet(paths, labels, content_keys(paths, threads=max(1, args.num_workers)))
