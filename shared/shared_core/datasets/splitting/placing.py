"""What decides where a sample goes: its content, its group, its near copies; and nothing else."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.fingerprint import content_keys
from shared_core.datasets.finding.quarantine import load_quarantine
from shared_core.datasets.finding.scan import Listing
from shared_core.datasets.splitting.manifest import Entry, Manifest, sorted_entries

NEAR_SHARE = 0.2  # of a class that one group of near copies may hold
NEAR_LEAST = 5  # images that it may hold in any case
Groups = Mapping[str, str] | Callable[[str], str]
Quarantine = Mapping[str, str] | str | Path


def place(seed: int, purpose: str, name: str) -> float:
    """The place in [0, 1) of ``name`` under ``seed``: uniform, and independent of all others."""
    text = f"{seed}\x1f{purpose}\x1f{name}".encode("utf-8", "surrogateescape")
    # 53 bits: exactly a double, and below 1.
    return (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11) / 2**53


def bounded_groups(
    listing: Listing, near: Sequence[Sequence[str]]
) -> tuple[tuple[Sequence[str], ...], str | None]:
    """Groups of near copies that may bind, and a line on those that may not.

    Pictures of a fixed camera, or digits, all look nearly alike: bound together they would put a
    whole class into one part. A group that holds more than ``NEAR_SHARE`` of a class is left apart;
    exact copies bind all the same.
    """
    label = {listing.relative(sample): sample.label for sample in listing.samples}
    counts = Counter(label.values())
    kept: list[Sequence[str]] = []
    dropped: list[Sequence[str]] = []
    for group in near:
        of_class = Counter(label[name] for name in group if name in label)
        large = any(n > max(NEAR_LEAST, NEAR_SHARE * counts[k]) for k, n in of_class.items())
        (dropped if large else kept).append(group)
    if not dropped:
        return tuple(kept), None
    most = max(dropped, key=len)
    return tuple(kept), (
        f"{len(most)} images look nearly alike ({most[0]} ...), too many to keep on one side: only "
        "exact copies bind them; parts may hold neighbours of one another"
    )


class Placing:
    """The samples that take part, with their keys and the names that decide their places."""

    def __init__(
        self,
        listing: Listing,
        *,
        groups: Groups | None = None,
        duplicates: Iterable[Sequence[str]] | None = None,
        quarantine: Quarantine | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        names = [listing.relative(sample) for sample in listing.samples]
        listed = load_quarantine(listing.root, quarantine)
        self.quarantined = {name: listed[name] for name in names if name in listed}
        kept = [i for i, name in enumerate(names) if name not in listed]
        if not kept:
            raise DatasetError(f"no sample of {listing.root} is left: all are quarantined")
        self.names = [names[i] for i in kept]
        self.labels = [listing.samples[i].label for i in kept]
        self.given = [listing.samples[i].split for i in kept]
        known = keys or {}
        unknown = [i for i in kept if not known.get(names[i])]
        fresh = content_keys([listing.samples[i].path for i in unknown])
        found = dict(zip((names[i] for i in unknown), fresh, strict=True))
        self.keys = [found.get(name) or known[name] for name in self.names]
        self.deciders = self._deciders(groups, duplicates)

    def _deciders(
        self, groups: Groups | None, duplicates: Iterable[Sequence[str]] | None
    ) -> list[str]:
        """A name per sample; samples that must stay together have the same one.

        It is the group's name, or the content key, so exact copies are together by themselves.
        Near copies are joined under the smallest name among them: a new file moves others only
        when it joins them.
        """
        own: list[str] = []
        for name, key in zip(self.names, self.keys, strict=True):
            group = None
            if groups is not None:
                group = groups(name) if callable(groups) else groups.get(name)
            own.append(f"key:{key}" if group is None else f"group:{group}")
        parent: dict[str, str] = {}

        def top(name: str) -> str:
            while name in parent:
                name = parent[name]
            return name

        def link(first: str, second: str) -> None:
            low, high = sorted((top(first), top(second)))
            if low != high:
                parent[high] = low

        by_key: dict[str, str] = {}
        for key, decider in zip(self.keys, own, strict=True):
            link(by_key.setdefault(key, decider), decider)  # copies in different groups
        position = {name: i for i, name in enumerate(self.names)}
        for copies in duplicates or ():
            members = [own[position[name]] for name in copies if name in position]
            for member in members[1:]:
                link(members[0], member)
        return [top(name) for name in own]


def build_manifest(
    listing: Listing,
    prepared: Placing,
    splits: Sequence[str],
    *,
    kind: str,
    fractions: Sequence[tuple[str, float]],
    seed: int,
    fold: tuple[int, int] | None = None,
) -> Manifest:
    """The manifest of samples whose parts are decided."""
    rows = zip(prepared.names, prepared.labels, prepared.keys, splits, strict=True)
    return Manifest(
        kind=kind,
        classes=listing.classes,
        fractions=tuple(fractions),
        seed=seed,
        entries=sorted_entries([Entry(*row) for row in rows]),
        fold=fold,
        quarantined=prepared.quarantined,
    )
