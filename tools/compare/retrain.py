"""Learning anew when images have come: all that had a part keep it, new ones are learned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from compare.contract import SPLIT_FILE
from shared_core.datasets import Manifest, scan
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.verify import verify
from shared_core.datasets.splitting.manifest import Entry, sorted_entries

NAME = "given_split.json"


def extended_split(
    earlier: Path, data_path: Path, target: Path, *, say: Callable[[str], None]
) -> Path:
    """The split of an earlier run with the images that have come since added to its training.

    An image that cannot be read, or whose copy judges, is left out.

    Args:
        earlier: folder of that run.
        data_path: its images and the new ones, in class folders.
        target: folder for the new manifest.

    Returns:
        The manifest's file.

    Raises:
        DatasetError: the earlier run's images are gone, or the classes are others now.
    """
    old, listing = Manifest.read(earlier / SPLIT_FILE, root=data_path), scan(data_path)
    if listing.classes != old.classes:
        different = sorted(set(listing.classes) ^ set(old.classes))
        raise DatasetError(
            f"{data_path} has other classes than {earlier} ({', '.join(different[:3])}): expected "
            "the same; start a run without --retrain"
        )
    report = verify(listing)
    known, broken = {entry.path for entry in old.entries}, report.quarantine()
    judging = {entry.key for entry in old.entries if entry.split != "train"}
    added, copies = [], 0
    for sample in listing.samples:
        path = listing.relative(sample)
        if path in known or path in broken or path in old.quarantined:
            continue
        if report.keys[path] in judging:
            copies += 1
            continue
        added.append(Entry(path, sample.label, report.keys[path], "train"))
    told = f"{len(added)} images have come since {earlier.name} and are learned from"
    told += f"; {copies} more are copies of images that judge" if copies else ""
    say(told)
    grown = replace(old, entries=sorted_entries([*old.entries, *added]), notes=(*old.notes, told))
    target.mkdir(parents=True, exist_ok=True)
    return grown.write(target / NAME)
