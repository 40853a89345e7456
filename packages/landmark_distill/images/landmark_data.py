"""The images of a run: from lists, from folders, or drawn; checked, set apart, written down."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from landmark_distill.config import DataConfig, ListFiles
from landmark_distill.images.file_lists import joined_labels, read_list, read_remap, remapped
from landmark_distill.images.landmark_scenes import is_drawn, make_landmark_scenes
from landmark_distill.images.truths import Truth, read_truth, usable_truths
from landmark_distill.images.two_level import LabelledPart, part_of, scan_levels, split_levels
from shared_core.datasets import DatasetError, ImageSet, Listing, Manifest, write_quarantine
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
        test: images of the open-set test.
        truths: which of their pairs are genuine, by ``coarse`` and ``fine``.
        class_names: of the head's rows; empty when the lists have numbers only.
        num_classes: rows that a new head needs.
        split_hash: of what lies where.
        tuning: images of unseen classes that are not the test's, labelled by class; or None.
        unseen: names of the test's classes that are not learned; lists have numbers only.
        asked_classes: rows that the options ask for, or None.
        untested: truths that the test images can show nothing of, with the reason.
        notes: what a reader of results should know.
    """

    name: str
    kind: str
    train: ImageSet | None
    calibration: ImageSet | None
    test: ImageSet
    truths: Mapping[str, Truth]
    class_names: tuple[str, ...]
    num_classes: int
    split_hash: str
    tuning: ImageSet | None = None
    unseen: tuple[str, ...] = ()
    asked_classes: int | None = None
    untested: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rehearsal(self) -> bool:
        """Whether the images were drawn by the program."""
        return self.kind == "built-in"

    def with_rows(
        self, rows: Sequence[int] | None, count: int, *, class_names: Sequence[str] | None = None
    ) -> LandmarkData:
        """The same images for a head of ``count`` rows that has its own order.

        Args:
            rows: the head's row of each class; None leaves the classes' numbers.
            class_names: of the head's rows; None leaves them.
        """
        names = self.class_names if class_names is None else tuple(class_names)
        found = replace(self, num_classes=count, class_names=names)
        if rows is None:
            return found
        table = np.asarray(rows, dtype=np.int64)

        def moved(images: ImageSet | None) -> ImageSet | None:
            return None if images is None else _relabelled(images, table[images.labels])

        return replace(found, train=moved(self.train), calibration=moved(self.calibration))

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


def _relabelled(images: ImageSet, labels: np.ndarray) -> ImageSet:
    return ImageSet(images.paths, labels, images.keys)


def prepare_landmarks(config: DataConfig, folder: Path) -> LandmarkData:
    """The images of a run; what was found out about them lies in ``folder``.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, or lists that do not fit together.
    """
    if config.lists is not None:
        return _from_lists(config, config.lists)
    return _from_folder(config, folder)


# -- folders and drawn scenes ---------------------------------------------------------------------


def _from_folder(config: DataConfig, folder: Path) -> LandmarkData:
    root = config.path
    if config.drawn is not None:
        root = make_landmark_scenes(folder / "data" / "scenes", config.drawn)
    if root is None:
        raise ValueError("the images come from nowhere, expected lists, a folder or drawn scenes")
    manifest, coarse_of = _split(config, root, folder)
    learned = {entry.label for entry in manifest.entries if entry.split == "train"}
    if len(learned) < 2:
        raise DatasetError(f"{root}: {len(learned)} classes to learn from, expected two")
    classes = tuple(manifest.classes[label] for label in sorted(learned))

    def part(name: str, names: tuple[str, ...] | None = None) -> LabelledPart:
        return part_of(manifest, root, name, coarse_of=coarse_of.__getitem__, classes=names)

    test = part(config.test_part)
    truths, said = usable_truths({"coarse": test.coarse, "fine": test.fine}, len(test.images))
    drawn = is_drawn(root)
    tested = set(test.fine.tolist())
    tune = config.learns and config.test_part == "test" and _unseen_part(manifest, learned)
    return LandmarkData(
        name="built-in scenes" if drawn else root.resolve().name,
        kind="built-in" if drawn else "real",
        train=part("train", classes).images if config.learns else None,
        calibration=part("calibration", classes).images if config.learns else None,
        test=test.images,
        truths=truths,
        class_names=classes,
        num_classes=_rows(config, len(classes)),
        split_hash=manifest.hash,
        tuning=part("validation").images if tune else None,
        unseen=tuple(manifest.classes[label] for label in sorted(tested - learned)),
        asked_classes=config.num_classes,
        untested=said,
        notes=(*manifest.notes, *said),
    )


def _unseen_part(manifest: Manifest, learned: set[int]) -> bool:
    """Whether the split keeps validation classes that are not learned."""
    labels = {entry.label for entry in manifest.entries if entry.split == "validation"}
    return bool(labels) and not labels & learned


def _split(config: DataConfig, root: Path, folder: Path) -> tuple[Manifest, dict[str, str]]:
    """What lies where, read or made, and the coarse name of each class."""
    split_file = config.split_file or folder / SPLIT_FILE
    if split_file.exists():
        manifest = Manifest.read(split_file, root=root)
        return manifest, {name: name.split("/")[0] for name in manifest.classes}
    listing, coarse = scan_levels(root, layout=config.layout)
    manifest = make_landmark_split(config, folder, listing, coarse)
    manifest.write(split_file)
    return manifest, dict(zip(listing.classes, coarse, strict=True))


def make_landmark_split(
    config: DataConfig, folder: Path, listing: Listing, coarse: tuple[str, ...]
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
        listing, coarse, keys=report.keys, hold_out=config.hold_out, quarantine=quarantine
    )


def _rows(config: DataConfig, needed: int) -> int:
    """Rows of the head: as many as asked for, and at least as many as there are labels."""
    if config.num_classes is None:
        return needed
    if config.num_classes < needed:
        raise DatasetError(
            f"--num_classes {config.num_classes}, the labels go up to {needed - 1}: expected at "
            f"least {needed}"
        )
    return config.num_classes


# -- lists ----------------------------------------------------------------------------------------


def _from_lists(config: DataConfig, lists: ListFiles) -> LandmarkData:
    remap = read_remap(lists.remap) if lists.remap else None
    train = calibration = None
    needed, said = 1, []
    digest = hashlib.sha256()
    if config.learns and lists.val is not None:
        read = [read_list(path, root) for path, root in lists.train]
        labels, needed = joined_labels(read, remap=remap)
        train = _image_set([path for one in read for path in one.files()], labels, config)
        chosen = read_list(*lists.val)
        # Its labels are those of the first training list; the original forgot the map here.
        mapped = remapped(chosen.labels, remap)
        if mapped.max() >= needed:
            raise DatasetError(
                f"{lists.val[0]}: label {int(chosen.labels[mapped.argmax()])} is none of the "
                f"{needed} classes that are learned"
            )
        calibration = _image_set(chosen.files(), mapped, config)
        said += [note for one in (*read, chosen) for note in one.notes]
        said.append(f"{len(read)} training lists, {len(train)} images")
        for part in (train, calibration):
            digest.update(repr((part.keys, part.labels.tolist())).encode())
    tested = read_list(*lists.test)
    test = _image_set(tested.files(), tested.labels, config)
    said += tested.notes
    digest.update(repr((test.keys, test.labels.tolist())).encode())
    masks = {"coarse": lists.coarse, "fine": lists.fine}
    truths, unsaid = usable_truths(
        {
            name: tested.labels if path is None else read_truth(path, len(test))
            for name, path in masks.items()
        },
        len(test),
    )
    return LandmarkData(
        name=config.name,
        kind="real",
        train=train,
        calibration=calibration,
        test=test,
        truths=truths,
        class_names=(),
        num_classes=_rows(config, needed),
        split_hash=digest.hexdigest(),
        asked_classes=config.num_classes,
        untested=unsaid,
        notes=(*said, *unsaid),
    )


def _image_set(paths: list[Path], labels: np.ndarray, config: DataConfig) -> ImageSet:
    """Images with content keys, which replayed views and stored knowledge are found by."""
    return ImageSet(paths, labels, content_keys(paths, threads=max(1, config.threads)))
