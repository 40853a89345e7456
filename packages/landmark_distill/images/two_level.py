"""Class folders and two-level folders (coarse/fine), split so that test classes are never seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from landmark_distill.config import LAYOUTS, HoldOut
from shared_core.datasets import DatasetError, ImageSet, Listing, Manifest, Sample, scan
from shared_core.datasets.splitting.manifest import Entry, sorted_entries

LEAST_LEARNED = 2  # classes that validation by share leaves to learn from
# What is learned from; images of the same classes that choose the best epoch; unseen classes that
# tune settings; unseen classes that are looked at once.
PARTS = ("train", "calibration", "validation", "test")


def scan_levels(root: str | Path, *, layout: str = "auto") -> tuple[Listing, tuple[str, ...]]:
    """List the images below ``root`` as fine classes, each with its coarse name.

    Args:
        root: ``class/image`` or ``coarse/fine/image``; train, val and test folders around these
            are joined, for classes that nobody has seen are set apart here.
        layout: ``class``, ``two-level``, or ``auto``: two-level when every image lies in a folder
            of a folder.

    Returns:
        The listing, whose classes are the fine ones (``coarse/fine`` in two levels), and the
        coarse name of each class. With one level each class is a coarse one of its own.

    Raises:
        DatasetError: no images, or images that lie too high for ``two-level``.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    flat = scan(root)
    above = 1 if flat.layout == "split" else 0  # folders of parts
    parts = [flat.relative(sample).split("/")[above:] for sample in flat.samples]
    deep = [len(p) >= 3 for p in parts]
    if layout == "two-level" and not all(deep):
        shallow = "/".join(parts[deep.index(False)])
        raise DatasetError(f"{root}: {shallow} lies in one folder, expected coarse/fine/image")
    if layout == "class" or not all(deep):
        return flat, flat.classes
    names = tuple(sorted({"/".join(p[:2]) for p in parts}, key=lambda n: n.encode()))
    number = {name: i for i, name in enumerate(names)}
    samples = tuple(
        Sample(sample.path, number["/".join(p[:2])], None)
        for sample, p in zip(flat.samples, parts, strict=True)
    )
    return Listing(flat.root, names, samples, flat.layout), tuple(n.split("/")[0] for n in names)


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}|{name}".encode("utf-8", "surrogateescape")).digest()


def assign_groups(coarse: Sequence[str], hold_out: HoldOut) -> dict[str, str]:
    """Part of each coarse group: ``test``, ``validation`` or ``train``.

    A part that is asked for by share takes groups in the order of a hash of seed and name until
    the share of the classes is reached; at least one group stays for training, and validation
    leaves two classes to learn from.

    Args:
        coarse: coarse name of each class.

    Raises:
        DatasetError: an unknown group, a group asked for twice, or nothing left to learn from.
    """
    sizes: dict[str, int] = {}
    for name in coarse:
        sizes[name] = sizes.get(name, 0) + 1
    parts: dict[str, str] = {}
    for part, names in (
        ("test", hold_out.test_groups),
        ("validation", hold_out.validation_groups),
    ):
        for name in names:
            if name not in sizes:
                raise DatasetError(
                    f"{part} group {name!r} is not among {', '.join(sorted(sizes)[:6])}..."
                )
            if name in parts:
                raise DatasetError(f"group {name!r} is asked for twice")
            parts[name] = part
    order = sorted(sizes, key=lambda name: _rank(hold_out.seed, name))
    for part, share, named in (
        ("test", hold_out.test, hold_out.test_groups),
        ("validation", hold_out.validation, hold_out.validation_groups),
    ):
        if named or share <= 0:
            continue
        wanted, taken = share * len(coarse), 0
        for name in order:
            left = len(coarse) - sum(sizes[one] for one in {*parts, name})
            if taken >= wanted or (part == "validation" and left < LEAST_LEARNED):
                break
            if name not in parts:
                parts[name] = part
                taken += sizes[name]
    if len(parts) >= len(sizes):
        raise DatasetError(
            f"{len(sizes)} groups of classes leave none to learn from: expected smaller shares, "
            "fewer named groups or more groups"
        )
    return {name: parts.get(name, "train") for name in sizes}


def split_levels(
    listing: Listing,
    coarse: Sequence[str],
    *,
    keys: Mapping[str, str],
    hold_out: HoldOut,
    quarantine: Mapping[str, str] | None = None,
) -> Manifest:
    """Set whole groups apart for the test, and some images of the others for calibration.

    A copy of an image that lies in two parts stays in the one that is looked at last, and is left
    out of the others.

    Args:
        coarse: coarse name of each class of the listing.
        keys: content key of each file by its path below the root.
        quarantine: files to leave out, with reasons.

    Raises:
        DatasetError: shares that cannot be met.
    """
    left_out = dict(quarantine or {})
    groups = assign_groups(coarse, hold_out)
    entries: list[Entry] = []
    by_class: dict[int, list[Entry]] = {}
    for sample in listing.samples:
        path = listing.relative(sample)
        if path in left_out:
            continue
        part = groups[coarse[sample.label]]
        entry = Entry(path, sample.label, keys[path], part)
        if part == "train":
            by_class.setdefault(sample.label, []).append(entry)
        else:
            entries.append(entry)
    for members in by_class.values():
        ranked = sorted(members, key=lambda e: (_rank(hold_out.seed, e.key), e.path))
        count = round(hold_out.calibration * len(members))
        count = min(max(count, 1 if hold_out.calibration > 0 else 0), len(members) - 1)
        entries += [entry._replace(split="calibration") for entry in ranked[:count]]
        entries += ranked[count:]
    left_out |= _copies(entries)
    kept = [e for e in entries if e.path not in left_out]
    notes = [
        f"{part}: {', '.join(sorted(g for g, p in groups.items() if p == part))}"
        for part in ("validation", "test")
        if part in groups.values() and len(groups) <= 60
    ]
    if listing.layout == "split":
        notes.append("the folder's own parts (train, test ...) are joined")
    return Manifest(
        kind="layout",
        classes=listing.classes,
        fractions=(),
        seed=hold_out.seed,
        entries=sorted_entries(kept),
        quarantined=left_out,
        notes=tuple(notes),
    )


def _copies(entries: Sequence[Entry]) -> dict[str, str]:
    """Copies of an image, but those in the part that is looked at last, with the reason."""
    last: dict[str, int] = {}
    for entry in entries:
        last[entry.key] = max(last.get(entry.key, 0), PARTS.index(entry.split))
    copies = [entry for entry in entries if PARTS.index(entry.split) < last[entry.key]]
    return {entry.path: "a copy lies in a later part" for entry in copies}


@dataclass(frozen=True)
class LabelledPart:
    """Images with the labels that training or verification needs.

    Attributes:
        images: labels are class numbers of the head where the part's classes are known to it,
            else the fine labels.
        fine, coarse: int64 ``(N,)``, for verification.
    """

    images: ImageSet
    fine: NDArray[np.int64]
    coarse: NDArray[np.int64]


def part_of(
    manifest: Manifest,
    root: Path,
    part: str,
    *,
    coarse_of: Callable[[str], str],
    classes: Sequence[str] | None = None,
) -> LabelledPart:
    """One part of a split.

    Args:
        coarse_of: coarse name of a fine class name.
        classes: the head's class names, when the images' labels are to index them.

    Raises:
        DatasetError: the part is empty, or a class is not the head's.
    """
    items = manifest.subset(part) if part in manifest.splits else []
    if not items:
        raise DatasetError(f"{root}: the {part} part is empty, expected images")
    names = [manifest.classes[item.label] for item in items]
    fine = np.array([item.label for item in items], dtype=np.int64)
    groups = {name: i for i, name in enumerate(sorted({coarse_of(n) for n in manifest.classes}))}
    coarse = np.array([groups[coarse_of(name)] for name in names], dtype=np.int64)
    labels = fine
    if classes is not None:
        place = {name: i for i, name in enumerate(classes)}
        unknown = next((name for name in names if name not in place), None)
        if unknown is not None:
            raise DatasetError(f"{root}: class {unknown!r} is not among the head's {len(place)}")
        labels = np.array([place[name] for name in names], dtype=np.int64)
    images = ImageSet([root / item.path for item in items], labels, [item.key for item in items])
    return LabelledPart(images, fine, coarse)
