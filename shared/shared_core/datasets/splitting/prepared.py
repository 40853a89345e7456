"""From a folder of images, or built-in scenes, to a verified split that is written down."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared_core.datasets.builtin.sources import make_scenes
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.quarantine import (
    honoured,
    load_quarantine,
    write_quarantine,
)
from shared_core.datasets.finding.scan import Listing, scan
from shared_core.datasets.reading.decode import decode
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.sets.spec_check import describe
from shared_core.datasets.sets.spec_type import DatasetSpec
from shared_core.datasets.splitting.layout_split import from_layout
from shared_core.datasets.splitting.manifest import Manifest
from shared_core.datasets.splitting.placing import Groups, bounded_groups
from shared_core.datasets.splitting.split import make_split
from shared_core.texts import say

SPLIT_FILE, VERIFY_FILE, QUARANTINE_FILE = "split.json", "verify.json", "quarantine.txt"
SPLITS = ("train", "calibration", "test")
FRACTIONS = (("train", 0.8), ("calibration", 0.1), ("test", 0.1))
BUILTIN_NAME = "built-in scenes"
GroupBy = Literal["near", "exact"]


@dataclass(frozen=True)
class PreparedData:
    """A data set that is ready to train on.

    Attributes:
        name: as records call it.
        kind: "real", "subset" (not all the images that the set is known to have) or "built-in".
        root: the folder that the manifest's paths start from.
        manifest: the split.
        notes: what differs from the published data set.
    """

    name: str
    kind: str
    root: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.manifest.classes

    @property
    def rehearsal(self) -> bool:
        """Whether the images are drawn by the program."""
        return self.kind == "built-in"

    def image_side(self) -> int:
        """The short side of the first image, pixels."""
        height, width = decode(self.root / self.manifest.entries[0].path).shape[:2]
        return int(min(height, width))

    def image_set(self, split: str) -> ImageSet:
        """The images of ``train``, ``calibration`` or ``test``.

        Raises:
            DatasetError: the split has no image.
        """
        items = self.manifest.subset(split)
        if not items:
            raise DatasetError(f"{self.root}: the {split} split is empty, expected images")
        return ImageSet(
            [self.root / item.path for item in items],
            [item.label for item in items],
            [item.key for item in items],
        )

    def facts(self, pixels: int) -> dict[str, Any]:
        """What a record says of the data; ``pixels`` is the side of the network's input."""
        return {
            "name": self.name,
            "kind": self.kind,
            "images": len(self.manifest.entries),
            "pixels": int(pixels),
            "split_hash": self.manifest.hash,
            "splits": {split: len(self.manifest.subset(split)) for split in self.manifest.splits},
            "notes": list(self.notes),
        }


def prepare_data(
    output: str | Path,
    *,
    root: str | Path | None,
    name: str | None = None,
    spec: DatasetSpec | None = None,
    num_classes: int | None = None,
    fractions: Sequence[tuple[str, float]] = FRACTIONS,
    split_seed: int = 0,
    quarantine: str | Path | None = None,
    workers: int = 0,
    scenes: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    group_by: GroupBy = "near",
    split: str | Path | None = None,
    drop_leaks: bool = False,
) -> PreparedData:
    """Find or make the images, look at every file once, split them, and write it all down.

    A file that cannot be read is left out and listed in ``quarantine.txt``; copies and near copies
    stay in one split. A folder of ``train``, ``val`` and ``test`` folders is split as it stands.
    When ``output`` holds a split already, that one is read and checked.

    Args:
        output: the run's folder; the split and the findings are written there.
        root: folder of class folders; None draws ``scenes`` into ``output``.
        name: as records call the set; the spec's name or the folder's own when None.
        spec: facts of the published set; a folder of another number of classes is refused, fewer
            images make it a "subset".
        num_classes: refuse another number.
        fractions: pairs of part and share for a folder without parts of its own.
        split_seed: what the split is seeded with.
        quarantine: a list of files to leave out.
        workers: processes that verify; 0 or 1 does it in this one.
        scenes: arguments of :func:`make_scenes`: ``num_classes``, ``image_size`` (pixels),
            ``images_per_class``, ``seed``.
        groups: path below the root -> name of the group that must stay on one side, or None.
        group_by: copies that stay on one side: ``near`` (nearly the same picture) or ``exact``
            (the same bytes). A near group that would swallow a class (images of a fixed camera)
            is taken apart, and a note says so.
        split: a manifest that decides who learns and who tests, so that several projects judge
            on the same images; its files must be below ``root``.
        drop_leaks: of given parts, leave out of training what has an exact copy in a later part.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, or other classes than expected; a
            manifest of other classes, or another one than the run began with.
    """
    output = Path(output)
    notes: list[str] = []
    if root is None:
        if scenes is None:
            raise ValueError("root is None and no scenes are given: expected one of them")
        listing = make_scenes(output / "data" / "scenes", **scenes)
        kind, name = "built-in", name or BUILTIN_NAME
    else:
        listing = scan(root)
        kind = "real"
        name = name or (spec.name if spec else Path(root).resolve().name or "images")
        if spec is not None:
            if len(listing.classes) != spec.num_classes:
                raise DatasetError(
                    f"{root} has {len(listing.classes)} class folders, {spec.name} has "
                    f"{spec.num_classes}: name it otherwise to use it all the same"
                )
            notes = describe(listing, spec)
    _check_classes(listing, num_classes)
    if root is not None:
        notes += listing.notes()
    split_file = output / SPLIT_FILE
    if split_file.exists():
        manifest = Manifest.read(split_file, root=listing.root)
        notes += _changed(listing, manifest, output)
        if split is not None and Manifest.read(split, root=listing.root).hash != manifest.hash:
            raise DatasetError(f"{output} was begun with another split than {split}")
    elif split is not None:
        manifest = _given(split, listing)
        manifest.write(split_file)
    else:
        manifest = _split(
            listing,
            output,
            spec,
            fractions,
            split_seed,
            quarantine,
            workers if workers > 1 else 0,
            groups,
            group_by,
            drop_leaks,
        )
        manifest.write(split_file)
    if spec is not None and spec.num_images and len(manifest.entries) < spec.num_images:
        kind = "subset"
    data = PreparedData(name, kind, Path(listing.root), manifest, (*notes, *manifest.notes))
    for note in data.notes:
        say(f"note: {note}", sys.stderr)
    for split in manifest.splits:
        data.image_set(split)  # an empty one is told now, not after an hour
    return data


def _changed(listing: Listing, manifest: Manifest, output: Path) -> list[str]:
    """A line for images that were added since the split was made.

    Raises:
        DatasetError: the classes are others now.
    """
    if listing.classes != manifest.classes:
        different = sorted(set(listing.classes) ^ set(manifest.classes))
        raise DatasetError(
            f"{listing.root} has other classes than when {output} was begun "
            f"({', '.join(different[:3])}): start anew with --fresh, or take them back"
        )
    known = {entry.path for entry in manifest.entries} | set(manifest.quarantined)
    new = [name for sample in listing.samples if (name := listing.relative(sample)) not in known]
    if not new:
        return []
    return [f"{len(new)} images were added since the split was made and are not used ({new[0]})"]


def _given(split: str | Path, listing: Listing) -> Manifest:
    """A manifest that someone hands in, held to the folder's classes by name."""
    manifest = Manifest.read(split, root=listing.root)
    if manifest.classes != listing.classes:
        different = sorted(set(manifest.classes) ^ set(listing.classes))
        raise DatasetError(
            f"{split} has other classes than {listing.root} ({', '.join(different[:3]) or 'order'})"
            ": expected a manifest of these images"
        )
    return manifest


def _check_classes(listing: Listing, num_classes: int | None) -> None:
    if len(listing.classes) < 2:
        raise DatasetError(
            f"{listing.root} has one class, {listing.classes[0]!r}: expected two or more folders"
        )
    if num_classes and num_classes != len(listing.classes):
        raise DatasetError(
            f"{listing.root} has {len(listing.classes)} classes, --num_classes says {num_classes}"
        )


def _split(
    listing: Listing,
    output: Path,
    spec: DatasetSpec | None,
    fractions: Sequence[tuple[str, float]],
    seed: int,
    quarantine_file: str | Path | None,
    workers: int,
    groups: Groups | None,
    group_by: GroupBy,
    drop_leaks: bool,
) -> Manifest:
    """Verify every file and make the split."""
    # Here: or ``python -m shared_core.datasets.finding.verify`` would find itself loaded already.
    from shared_core.datasets.finding.verify import verify

    report = verify(listing, spec=spec, workers=workers)
    report.write(output / VERIFY_FILE)
    known = [listing.relative(sample) for sample in listing.samples]
    given, notes = honoured(
        load_quarantine(listing.root, quarantine_file),
        known,
        where=quarantine_file or QUARANTINE_FILE,
    )
    notes += report.notes()
    if any(n for name, n in report.outcomes().items() if name not in ("used", "ignored", "stray")):
        notes += (report.files_line(),)
    quarantine = report.quarantine() | given
    if quarantine:
        write_quarantine(output / QUARANTINE_FILE, quarantine)
        path, reason = next(iter(quarantine.items()))
        print(
            f"left out {len(quarantine)} files ({path}: {reason}); "
            f"all are in {output / QUARANTINE_FILE}",
            file=sys.stderr,
        )
    if listing.layout == "split":
        manifest = from_layout(
            listing,
            seed=seed,
            quarantine=quarantine,
            keys=report.keys,
            near=report.duplicates_near,
            drop_leaks=drop_leaks,
        )
        return replace(manifest, notes=(*manifest.notes, *notes))
    near, note = bounded_groups(listing, report.duplicates_near if group_by == "near" else ())
    manifest = make_split(
        listing,
        fractions=fractions,
        seed=seed,
        groups=groups,
        duplicates=(*report.duplicates_exact, *near),
        quarantine=quarantine,
        keys=report.keys,
        gaps="fill",
    )
    notes += () if note is None else (note,)
    return replace(manifest, notes=(*manifest.notes, *notes))
