"""Train, val and test folders as somebody else made them become a split that is kept as given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.scan import Listing
from shared_core.datasets.splitting.manifest import Manifest
from shared_core.datasets.splitting.placing import Placing, Quarantine, build_manifest, place


def from_layout(
    listing: Listing,
    *,
    seed: int = 0,
    missing: Literal["hash", "leave", "error"] = "hash",
    share: float = 0.5,
    calibration_share: float = 0.1,
    drop_leaks: bool = False,
    quarantine: Quarantine | None = None,
    keys: Mapping[str, str] | None = None,
    near: Iterable[Sequence[str]] = (),
) -> Manifest:
    """Keep train/val/test folders as they are given; the val folder is the part "calibration".

    Args:
        missing: what to do without a test or a val folder. "hash": without test, val is divided
            by hash into test (``share`` of it) and calibration, so that what is chosen on
            calibration is tested on images it has not seen; without val, ``calibration_share`` of
            train becomes calibration. "leave": the part is not made. "error": refuse.
        drop_leaks: leave out of train (then of calibration) what has an exact copy in a later
            part; the manifest lists them as quarantined. Otherwise leaks are noted only.
        keys: known content keys by path (``VerifyReport.keys``), not to be computed again.
        near: groups of paths of nearly the same picture: those across the given parts are noted,
            those inside a part that is divided here stay together.

    Raises:
        DatasetError: no split folders, no train folder, only train, ``missing="error"``, or a class
            without training images.
    """
    if listing.layout != "split":
        raise DatasetError(f"{listing.root} has no train/val/test folders; use make_split")
    present = {sample.split for sample in listing.samples}
    if "train" not in present or len(present) == 1:
        raise DatasetError(
            f"{listing.root} has the split folders {sorted(str(p) for p in present)}, "
            "expected train with val or test; use make_split"
        )
    absent = sorted({"val", "test"} - {str(p) for p in present})
    if absent and missing == "error":
        raise DatasetError(f"{listing.root} has no {absent[0]} folder")
    for name, value in (("share", share), ("calibration_share", calibration_share)):
        if not 0 < value < 1:
            raise DatasetError(f"{name} is {value}, expected above 0 and below 1")
    near = [tuple(group) for group in near]
    prepared = Placing(listing, quarantine=quarantine, keys=keys, duplicates=near)
    rename = {"train": "train", "val": "calibration", "test": "test"}
    splits = [rename[str(given)] for given in prepared.given]
    notes = []
    if absent and missing == "hash":
        source, target, part = (
            ("calibration", "test", share)
            if absent == ["test"]
            else ("train", "calibration", calibration_share)
        )
        splits = [
            target if s == source and place(seed, "layout", name) < part else s
            for s, name in zip(splits, prepared.deciders, strict=True)
        ]
        notes.append(f"no {absent[0]} folder: {part:g} of {source} is {target}, by hash")
    notes += _class_gaps(listing, prepared, splits)
    crossing = _crossing(prepared, splits, near)
    if crossing:
        notes.append(
            f"{crossing} files of train have a near copy (nearly the same picture) in a later part"
        )
    leaks = _leaks(prepared.keys, splits)
    if leaks:
        what = "left out" if drop_leaks else "kept"
        notes.append(f"{len(leaks)} files have an exact copy in a later part; {what}")
        if drop_leaks:
            prepared.quarantined |= {
                prepared.names[i]: f"copy of a file in {part}" for i, part in leaks.items()
            }
    manifest = build_manifest(listing, prepared, splits, kind="layout", fractions=(), seed=seed)
    if drop_leaks:
        entries = tuple(e for e in manifest.entries if e.path not in prepared.quarantined)
        manifest = replace(manifest, entries=entries)
    return replace(manifest, notes=tuple(notes))


def _class_gaps(listing: Listing, prepared: Placing, splits: Sequence[str]) -> list[str]:
    """A line for each class that a judging part lacks.

    Raises:
        DatasetError: a class without training images: nobody could learn it.
    """
    have: dict[str, set[int]] = {}
    for label, split in zip(prepared.labels, splits, strict=True):
        have.setdefault(split, set()).add(label)
    lines = []
    for split in ("train", *sorted(set(have) - {"train"})):
        lacking = [c for k, c in enumerate(listing.classes) if k not in have.get(split, set())]
        if lacking and split == "train":
            raise DatasetError(
                f"{listing.root}: class {lacking[0]!r} has no usable image in the training part; "
                "expected some, or no folder of that class"
            )
        if lacking:
            lines.append(f"{split} has no image of {', '.join(lacking[:5])}")
    return lines


def _crossing(prepared: Placing, splits: Sequence[str], near: Sequence[Sequence[str]]) -> int:
    """How many training files have a near, not exact, copy in another part."""
    place_of = {name: i for i, name in enumerate(prepared.names)}
    count = 0
    for group in near:
        members = [place_of[name] for name in group if name in place_of]
        others = {prepared.keys[i] for i in members if splits[i] != "train"}
        count += sum(bool(others - {prepared.keys[i]}) for i in members if splits[i] == "train")
    return count


def _leaks(keys: Sequence[str], splits: Sequence[str]) -> dict[int, str]:
    """Index of a sample that has an exact copy in a later part, and that part."""
    order = {"train": 0, "calibration": 1, "test": 2}
    last: dict[str, str] = {}
    for key, split in zip(keys, splits, strict=True):
        if order[split] > order.get(last.get(key, ""), -1):
            last[key] = split
    return {
        i: last[key]
        for i, (key, split) in enumerate(zip(keys, splits, strict=True))
        if last[key] != split
    }
