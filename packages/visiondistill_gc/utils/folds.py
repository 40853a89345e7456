"""K folds: classes evenly spread, copies of one photograph never on two sides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from shared_core.datasets import DatasetError
from shared_core.datasets.finding.placing import place
from shared_core.datasets.splitting.manifest import Entry

KINDS = ("stratified", "plain")


def group_names(
    entries: Sequence[Entry],
    *,
    duplicates: Iterable[Sequence[str]] = (),
    pattern: str | None = None,
) -> list[str]:
    """The group of each sample; samples of one group stay on one side.

    Exact copies (equal content keys) always are a group.

    Args:
        entries: samples of a manifest.
        duplicates: groups of paths that belong together, near copies say.
        pattern: a regular expression on the file's name without suffix; files with equal matches
            (its first bracket, or all of it) in one class belong together. It suits augmented
            copies that carry the name of their original.

    Raises:
        DatasetError: not a regular expression.
    """
    try:
        wanted = re.compile(pattern) if pattern else None
    except re.error as error:
        raise DatasetError(f"group pattern {pattern!r} is no regular expression: {error}") from None
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    def link(first: str, second: str) -> None:
        low, high = sorted((top(first), top(second)))
        if low != high:
            parent[high] = low

    nodes = [f"key:{entry.key}" for entry in entries]
    by_path = {entry.path: node for entry, node in zip(entries, nodes, strict=True)}
    for copies in duplicates:
        members = [by_path[path] for path in copies if path in by_path]
        for member in members[1:]:
            link(members[0], member)
    if wanted is not None:
        seen: dict[tuple[int, str], str] = {}
        for entry, node in zip(entries, nodes, strict=True):
            found = wanted.search(entry.path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
            if found:
                text = found.group(1) if found.groups() else found.group(0)
                link(seen.setdefault((entry.label, text), node), node)
    return [top(node) for node in nodes]


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
    if folds < 2 or kind not in KINDS:
        raise DatasetError(
            f"{folds} folds of kind {kind!r}, expected 2 or more, {', '.join(KINDS)}"
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
