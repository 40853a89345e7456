"""K folds: classes evenly spread, copies of one photograph never on two sides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shared_core.datasets import DatasetError
from shared_core.datasets.finding.scan import Listing, Sample, part_of
from shared_core.datasets.splitting.manifest import Entry
from shared_core.datasets.splitting.placing import Placing, bounded_groups, place
from visiondistill_gc.options import FOLD_KINDS

Matcher = Callable[[str], str | None]  # path below the root to the group that its name tells


def group_matcher(pattern: str | None) -> Matcher:
    """What a path tells of its group: files of a class with equal matches belong together.

    The path's first folder is the class (below ``train``, ``val`` or ``test`` the second).

    Args:
        pattern: a regular expression on the name without suffix; its first bracket counts, or all
            of it. It suits augmented copies that carry the name of their original. None matches
            nothing.

    Raises:
        DatasetError: not a regular expression.
    """
    try:
        wanted = re.compile(pattern) if pattern else None
    except re.error as error:
        raise DatasetError(f"group pattern {pattern!r} is no regular expression: {error}") from None

    def group(path: str) -> str | None:
        name = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        found = wanted.search(name) if wanted else None
        match = found and (found.group(1) if found.groups() else found.group(0))
        first, *more = path.split("/")[:-1]
        kind = more[0] if more and part_of(first) else first
        return None if match is None else f"{kind}/{match}"

    return group


def group_names(
    entries: Sequence[Entry],
    *,
    root: Path,
    near: Sequence[Sequence[str]] = (),
    matcher: Matcher | None = None,
) -> list[str]:
    """The group of each sample; samples of one group stay on one side.

    Exact copies (equal content keys) always are a group; near copies are one unless they would
    swallow a class, as for the held-out part.

    Args:
        entries: samples of a manifest.
        root: the folder that their paths start from.
        near: groups of paths of nearly the same picture.
        matcher: see :func:`group_matcher`.
    """
    samples = tuple(Sample(root / entry.path, entry.label, None) for entry in entries)
    listing = Listing(root, (), samples, "single")
    placing = Placing(
        listing,
        groups=matcher,
        duplicates=bounded_groups(listing, near)[0],
        quarantine={},
        keys={entry.path: entry.key for entry in entries},
    )
    return placing.deciders


def make_folds(
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[str],
    *,
    folds: int,
    seed: int,
    kind: str = "stratified",
) -> np.ndarray:
    """The fold of each sample, int64 ``(N,)``; a sample is validated in its own fold.

    ``stratified`` deals whole groups, largest first and then by the hash of seed and name, to the
    fold that has the fewest samples of the group's classes. ``plain`` deals by the hash alone, so
    that a new file moves no other; classes are even only in expectation.

    Args:
        labels: class numbers.
        groups: a name per sample.
        folds: at least 2.
        seed: another seed gives other folds.
        kind: ``stratified`` or ``plain``.

    Raises:
        DatasetError: too few samples, or a fold without samples.
    """
    if folds < 2 or kind not in FOLD_KINDS:
        raise DatasetError(
            f"{folds} folds of kind {kind!r}, expected 2 or more, {', '.join(FOLD_KINDS)}"
        )
    labels = np.asarray(labels)
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    hashes = {group: place(seed, "visiondistill fold", group) for group in members}
    result = np.empty(len(labels), np.int64)
    if kind == "plain":
        for group, indices in members.items():
            result[indices] = int(hashes[group] * folds)
    else:
        classes = int(labels.max()) + 1
        table = np.zeros((folds, classes), np.int64)
        for group in sorted(members, key=lambda g: (-len(members[g]), hashes[g], g)):
            counts = np.bincount(labels[members[group]], minlength=classes)
            own = table[:, counts > 0].sum(axis=1)
            chosen = min(range(folds), key=lambda f: (own[f], table[f].sum(), f))
            table[chosen] += counts
            result[members[group]] = chosen
    sizes = np.bincount(result, minlength=folds)
    if sizes.min() == 0:
        raise DatasetError(
            f"{len(members)} groups of images make {folds} folds of {sizes.tolist()} images, "
            "expected some in each: take fewer folds"
        )
    return result
