"""K folds: classes evenly spread, copies of one photograph never on two sides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from shared_core.datasets import DatasetError
from shared_core.datasets.splitting.manifest import Entry
from shared_core.datasets.splitting.placing import place
from visiondistill_gc.options import FOLD_KINDS

Matcher = Callable[[str], str | None]  # path below the root to what its name has in common


def group_matcher(pattern: str | None) -> Matcher:
    """What a file's name tells of its group: files of a class with equal matches belong together.

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
        return found and (found.group(1) if found.groups() else found.group(0))

    return group


def group_names(
    entries: Sequence[Entry],
    *,
    duplicates: Iterable[Sequence[str]] = (),
    matcher: Matcher | None = None,
) -> list[str]:
    """The group of each sample; samples of one group stay on one side.

    Exact copies (equal content keys) always are a group.

    Args:
        entries: samples of a manifest.
        duplicates: groups of paths that belong together, near copies say.
        matcher: see :func:`group_matcher`.
    """
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
    seen: dict[tuple[int, str], str] = {}
    for entry, node in zip(entries, nodes, strict=True):
        match = matcher(entry.path) if matcher else None
        if match is not None:
            link(seen.setdefault((entry.label, match), node), node)
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
