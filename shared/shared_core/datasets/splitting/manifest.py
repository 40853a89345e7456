"""The written form of a split: which file is in which part, with a hash over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.finding.quarantine import write_text
from shared_core.texts import read_json

SCHEMA = "shared-core.split/1"


class Entry(NamedTuple):
    """One sample: path below the root, class index, content key, name of its part."""

    path: str
    label: int
    key: str
    split: str


class Item(NamedTuple):
    """One sample of a part that was asked for."""

    path: str
    label: int
    key: str


@dataclass(frozen=True)
class Manifest:
    """A split of a data set. Paths are relative to its folder, so it can be moved.

    Attributes:
        kind: "random" (by hash), "kfold", or "layout" (as the folders gave it).
        classes: class names; labels index them.
        fractions: (part, wanted share in [0, 1]) in order; () for a layout.
        seed: what the hash was seeded with.
        entries: all samples, sorted by path as UTF-8 bytes.
        fold: (index, number of folds) of a k-fold manifest.
        quarantined: files left out, with reasons.
        notes: what a reader of results should know (a class missing in a part, copies found).
    """

    kind: str
    classes: tuple[str, ...]
    fractions: tuple[tuple[str, float], ...]
    seed: int
    entries: tuple[Entry, ...]
    fold: tuple[int, int] | None = None
    quarantined: Mapping[str, str] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the parts: in the order of the fractions, else of their first sample."""
        if self.fractions:
            return tuple(name for name, _ in self.fractions)
        return tuple(dict.fromkeys(entry.split for entry in self.entries))

    @cached_property
    def hash(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the canonical JSON of everything but the notes."""
        content = self._content()
        del content["notes"]  # remarks may be worded anew; the split is the same
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def subset(self, split: str) -> list[Item]:
        """The samples of one part, sorted by path.

        Raises:
            DatasetError: there is no part of this name.
        """
        if split not in self.splits:
            raise DatasetError(f"no part {split!r} in the split; it has {', '.join(self.splits)}")
        return [Item(e.path, e.label, e.key) for e in self.entries if e.split == split]

    def counts(self) -> dict[str, list[int]]:
        """Images of each class (in the order of ``classes``) in each part."""
        table = {name: [0] * len(self.classes) for name in self.splits}
        for entry in self.entries:
            table[entry.split][entry.label] += 1
        return table

    def shares(self) -> dict[str, list[float]]:
        """Achieved share in [0, 1] of each class in each part; nan for a class without images."""
        counts = self.counts()
        totals = [sum(column) for column in zip(*counts.values(), strict=True)]
        return {
            name: [
                n / total if total else float("nan") for n, total in zip(row, totals, strict=True)
            ]
            for name, row in counts.items()
        }

    def gaps(self) -> list[tuple[str, str]]:
        """(class, part) without a sample, for classes that have as many images as parts."""
        counts = self.counts()
        totals = [sum(column) for column in zip(*counts.values(), strict=True)]
        return [
            (self.classes[label], name)
            for label, total in enumerate(totals)
            for name in self.splits
            if total >= len(self.splits) and counts[name][label] == 0
        ]

    def summary(self) -> str:
        """A few lines: images of each part, and the smallest and largest share of a class."""
        counts, shares, images = self.counts(), self.shares(), len(self.entries)
        wanted = dict(self.fractions)
        lines = [f"{images:,} images, {len(self.classes)} classes, split {self.hash[:12]}"]
        for name in self.splits:
            real = [(s, c) for s, c in zip(shares[name], self.classes, strict=True) if s == s]
            (low, low_class), (high, high_class) = min(real), max(real)
            aim = f", wanted {wanted[name]:.3f}" if name in wanted else ""
            lines.append(
                f"  {name}: {sum(counts[name]):,} images ({sum(counts[name]) / images:.3f}"
                f"{aim}); by class from {low:.3f} ({low_class}) to {high:.3f} ({high_class})"
            )
        if self.quarantined:
            lines.append(f"  left out: {len(self.quarantined):,} files")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _content(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "seed": self.seed,
            "fractions": [list(pair) for pair in self.fractions],
            "fold": list(self.fold) if self.fold is not None else None,
            "classes": list(self.classes),
            "notes": list(self.notes),
            "quarantined": dict(self.quarantined),
            "samples": [list(entry) for entry in self.entries],
        }

    def write(self, path: str | Path) -> Path:
        """Write as JSON, one sample a line; a crash leaves the old file or the new one."""
        content = {"hash": self.hash, **self._content()}
        samples = content.pop("samples")
        head = json.dumps(content, indent=1)[:-2]  # without the closing "\n}"
        lines = ",\n".join("  " + json.dumps(sample) for sample in samples)
        write_text(path, f'{head},\n "samples": [\n{lines}\n ]\n}}\n')
        return Path(path)

    @classmethod
    def read(cls, path: str | Path, *, root: str | Path | None = None) -> Manifest:
        """Read a manifest and check it.

        Args:
            root: the data set's folder; when given, every file must be there.

        Raises:
            DatasetNotFoundError: no such manifest, or one of its files is not below ``root``.
            DatasetError: not a manifest, or changed since its hash was made.
        """
        path = Path(path)
        if not path.is_file():
            raise DatasetNotFoundError(f"no split manifest at {path}")
        try:
            content = read_json(path)
            if content["schema"] != SCHEMA:
                raise DatasetError(f"{path} has schema {content['schema']!r}, expected {SCHEMA!r}")
            manifest = cls(
                kind=str(content["kind"]),
                classes=tuple(content["classes"]),
                fractions=tuple((str(n), float(f)) for n, f in content["fractions"]),
                seed=content["seed"],
                entries=tuple(Entry(*sample) for sample in content["samples"]),
                fold=tuple(content["fold"]) if content["fold"] is not None else None,
                quarantined=dict(content["quarantined"]),
                notes=tuple(content["notes"]),
            )
            expected = content["hash"]
            actual = manifest.hash
        except DatasetError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{path} is not a split manifest: {type(error).__name__} "
                f"{' '.join(str(error).split())}"
            ) from None
        if actual != expected:
            raise DatasetError(
                f"{path} was changed: its content hashes to {actual[:12]}, it says "
                f"{str(expected)[:12]}"
            )
        _check_entries(manifest, path)
        if root is not None:
            _check_files(manifest, Path(root))
        return manifest


def _check_entries(manifest: Manifest, path: Path) -> None:
    parts = set(manifest.splits)
    for entry in manifest.entries:
        if entry.split not in parts or not 0 <= entry.label < len(manifest.classes):
            raise DatasetError(f"{path}: sample {entry.path!r} has an unknown part or label")
        if entry.path.startswith("/") or ".." in entry.path.split("/"):
            raise DatasetError(f"{path}: sample {entry.path!r} is not below the data set's folder")


def _check_files(manifest: Manifest, root: Path) -> None:
    gone = [entry.path for entry in manifest.entries if not (root / entry.path).is_file()]
    if gone:
        raise DatasetNotFoundError(
            f"{root / gone[0]} of the split is missing ({len(gone):,} of "
            f"{len(manifest.entries):,} files are); scan and split again, or restore it"
        )


def canonical_json(content: object) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sorted_entries(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Entries in the manifest's order."""
    return tuple(sorted(entries, key=lambda e: e.path.encode("utf-8", "surrogateescape")))
