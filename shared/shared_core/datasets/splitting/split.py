"""Train, calibration and test parts, and folds, decided by seed and content alone.

A sample's place is a hash of the seed and of its content key (or group), nothing else: a file
that is added or taken away moves no other, files may be renamed, and the same pictures are split
the same way on every machine. Each class is thus split by the wanted shares *in expectation*;
``Manifest.shares`` tells what came out. It also follows that no such rule can promise that a small
class has a sample in every part: whether one file must stand in cannot be known without looking at
the others. With n images and a part of share f, the part is empty with probability (1 - f)^n
(f = 0.1: 12 % at 20 images, 0.003 % at 100). Such gaps are warned about by name, can be made an
error, or be filled (``gaps="fill"``) at the price that one sample of that class may then move when
a file is added.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.scan import Listing
from shared_core.datasets.splitting.layout_split import from_layout
from shared_core.datasets.splitting.manifest import Entry, Item, Manifest
from shared_core.datasets.splitting.placing import (
    Groups,
    Placing,
    Quarantine,
    build_manifest,
    place,
)

__all__ = ["Entry", "Item", "Manifest", "from_layout", "make_kfold", "make_split", "place"]

FRACTIONS = (("train", 0.7), ("calibration", 0.1), ("test", 0.2))

Fractions = Sequence[tuple[str, float]]
Gaps = Literal["warn", "error", "fill", "ignore"]


def _check_fractions(fractions: Fractions) -> tuple[tuple[str, float], ...]:
    pairs = tuple((str(name), float(share)) for name, share in fractions)
    if not pairs or len({name for name, _ in pairs}) != len(pairs):
        raise DatasetError(f"fractions are {pairs}, expected pairs of different part names")
    if any(not 0 < share <= 1 for _, share in pairs) or not math.isclose(
        math.fsum(share for _, share in pairs), 1.0, abs_tol=1e-9
    ):
        raise DatasetError(f"fractions are {pairs}, expected shares above 0 that sum to 1")
    return pairs


def _part(position: float, fractions: Sequence[tuple[str, float]]) -> str:
    edge = 0.0
    for name, share in fractions:
        edge += share
        if position < edge:
            return name
    return fractions[-1][0]  # rounding of the last edge


def make_split(
    listing: Listing,
    *,
    fractions: Fractions = FRACTIONS,
    seed: int,
    groups: Groups | None = None,
    duplicates: Iterable[Sequence[str]] | None = None,
    quarantine: Quarantine | None = None,
    keys: Mapping[str, str] | None = None,
    gaps: Gaps = "warn",
) -> Manifest:
    """Split a listing by hash; split folders that it may have are not looked at.

    Args:
        listing: what ``scan`` found.
        fractions: (part, share) with shares above 0 that sum to 1.
        seed: another seed is another, independent split.
        groups: path below the root -> name of the group that must stay together (a mapping or a
            function); None for a path stands for no group.
        duplicates: groups of paths that must stay together (``VerifyReport.duplicates``); exact
            copies always do.
        quarantine: files to leave out: {path: reason}, a list's path, or None for
            ``root/quarantine.txt`` where there is one.
        keys: known content keys by path (``VerifyReport.keys``), not to be computed again.
        gaps: what to do when a class with enough images has none in a part; see the module.

    Raises:
        DatasetError: bad fractions, nothing left to split, or a gap with ``gaps="error"``.
    """
    parts = _check_fractions(fractions)
    prepared = Placing(
        listing, groups=groups, duplicates=duplicates, quarantine=quarantine, keys=keys
    )
    chosen = {name: _part(place(seed, "split", name), parts) for name in set(prepared.deciders)}
    splits = [chosen[name] for name in prepared.deciders]
    if gaps == "fill":
        splits = _fill_gaps(prepared, splits, parts, seed)
    manifest = build_manifest(listing, prepared, splits, kind="random", fractions=parts, seed=seed)
    return _judge_gaps(manifest, gaps)


def _fill_gaps(
    prepared: Placing, splits: Sequence[str], parts: Sequence[tuple[str, float]], seed: int
) -> list[str]:
    """Move the smallest groups that are needed so that each class is in each part.

    A class's gap is filled by the group with the smallest hash among those of that class alone
    that lie in a part which keeps another group of the class.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, decider in enumerate(prepared.deciders):
        members[decider].append(i)
    chosen = {decider: splits[indices[0]] for decider, indices in members.items()}
    of_class: dict[int, list[str]] = defaultdict(list)
    for decider, indices in members.items():
        if len({prepared.labels[i] for i in indices}) == 1:
            of_class[prepared.labels[indices[0]]].append(decider)
    for label in sorted(set(prepared.labels)):
        own = of_class[label]
        for part, _ in parts:
            have = Counter(
                chosen[decider]
                for decider, indices in members.items()
                if any(prepared.labels[i] == label for i in indices)
            )
            movable = [d for d in own if have[chosen[d]] > 1]
            if have[part] == 0 and movable:
                chosen[min(movable, key=lambda d: (place(seed, f"fill {part}", d), d))] = part
    return [chosen[decider] for decider in prepared.deciders]


def _judge_gaps(manifest: Manifest, gaps: Gaps) -> Manifest:
    found = manifest.gaps()
    if not found or gaps == "ignore":
        return manifest
    name, part = found[0]
    more = f" (and {len(found) - 1} more such gaps)" if len(found) > 1 else ""
    line = (
        f"class {name!r} has no sample in part {part!r}{more}; "
        "take more images, larger shares or another seed"
        + (", or gaps='fill'" if gaps != "fill" else "")
    )
    if gaps == "error":
        raise DatasetError(line)
    if gaps == "warn":
        warnings.warn(line, stacklevel=3)
    return replace(manifest, notes=(*manifest.notes, line))


def make_kfold(
    listing: Listing,
    *,
    folds: int,
    seed: int,
    groups: Groups | None = None,
    duplicates: Iterable[Sequence[str]] | None = None,
    quarantine: Quarantine | None = None,
    keys: Mapping[str, str] | None = None,
    calibration: bool = False,
    gaps: Gaps = "warn",
) -> list[Manifest]:
    """``folds`` manifests; each sample is in "test" of exactly one, by the rule of ``make_split``.

    Args:
        folds: at least 2; at least 3 with ``calibration``.
        calibration: fold i + 1 (the first after the last) is the part "calibration" of manifest
            i, so that epochs and thresholds are not chosen on what is tested. Otherwise the parts
            are "train" and "test".
        gaps: as in ``make_split``; "fill" is not possible here, a fold's test is the others' train.

    Raises:
        DatasetError: too few folds, nothing to split, or a gap with ``gaps="error"``.
    """
    least = 3 if calibration else 2
    if folds < least:
        raise DatasetError(f"folds is {folds}, expected at least {least}")
    if gaps == "fill":
        raise DatasetError("gaps='fill' is for make_split; folds cannot lend samples to each other")
    prepared = Placing(
        listing, groups=groups, duplicates=duplicates, quarantine=quarantine, keys=keys
    )
    number = [int(place(seed, "fold", name) * folds) for name in prepared.deciders]
    names = ("train", "calibration", "test") if calibration else ("train", "test")
    shares = {
        "train": (folds - len(names) + 1) / folds,
        "calibration": 1 / folds,
        "test": 1 / folds,
    }
    manifests = []
    for fold in range(folds):
        special = {fold: "test"}
        if calibration:
            special[(fold + 1) % folds] = "calibration"
        manifest = build_manifest(
            listing,
            prepared,
            [special.get(n, "train") for n in number],
            kind="kfold",
            fractions=[(name, shares[name]) for name in names],
            seed=seed,
            fold=(fold, folds),
        )
        manifests.append(_judge_gaps(manifest, gaps))
    return manifests
