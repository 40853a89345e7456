"""The data check: what is in a folder of images, what is wrong with it, who learns and who judges.

Everything that is found is kept in ``data/`` of the run's folder; a check that is finished is read
back, one that was stopped begins anew but for the features of the images, which go on.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compare.contract import (
    CHECK_FILE,
    FEATURES_FILE,
    FINDINGS,
    SPLIT_FILE,
    TINY,
    DataCheck,
    Finding,
    read,
    write,
)
from compare.labels import (
    LabelCheck,
    StoredFeatures,
    check_labels,
    feature_size,
    read_features,
    store_features,
    trained_features,
)
from compare.pictures import Tile, write_sheet
from shared_core.datasets import DatasetError, ImageSet, Manifest, PreparedData, prepare_data, scan
from shared_core.datasets.finding.fingerprint import join
from shared_core.datasets.finding.unpack import Limits, unpack
from shared_core.datasets.finding.verify import verify
from shared_core.datasets.finding.verify_report import ERRORS
from shared_core.datasets.splitting.manifest import Entry
from shared_core.datasets.splitting.placing import bounded_groups, place
from shared_core.datasets.splitting.prepared import SPLITS, VERIFY_FILE
from shared_core.runs.command import UsageError
from shared_core.runs.json_files import read_object
from shared_core.runs.progress import format_seconds
from shared_core.texts import printable

SMALL = 40  # images of a class; fewer are dealt out exactly, more by hash
SMALL_SHARES = (("train", 0.6), ("calibration", 0.15), ("test", 0.25))
LISTED = 200  # findings of a kind that are kept
SHOWN = 40  # pictures of a contact sheet
SCENES = {"num_classes": 4, "image_size": 64, "images_per_class": 40}


def check(
    data_path: Path | None,
    folder: Path,
    *,
    split: Path | None = None,
    seed: int = 0,
    threads: int = 1,
    say: Callable[[str], None],
) -> DataCheck:
    """Look at every image, split them, and write down what was found.

    Args:
        data_path: folder of class folders (or of train, val, test with such folders), or an
            archive of one; None draws built-in scenes.
        folder: the run's; ``data/check.json``, ``data/split.json`` and more are left there.
        split: a manifest that decides who learns and who judges.
        seed: of the split.
        threads: processes that read, threads that compute.
        say: where lines go.

    Raises:
        DatasetError: the images cannot be compared on: one line says what is missing.
    """
    if (folder / CHECK_FILE).is_file():
        return read(folder / CHECK_FILE, DataCheck)
    started = time.monotonic()
    room = (folder / CHECK_FILE).parent
    room.mkdir(parents=True, exist_ok=True)
    (folder / SPLIT_FILE).unlink(missing_ok=True)  # of a check that was stopped or refused
    name = None if data_path is None else data_path.resolve().name
    if data_path is not None and data_path.is_file():
        name = data_path.name.partition(".")[0]
        data_path = unpack(data_path, room / "unpacked", limits=Limits())
    data, report = _prepared(data_path, room, name, split=split, seed=seed, threads=threads)
    groups = _copy_groups(data, report)
    if data.manifest.kind == "random" and split is None:
        data = replace(data, manifest=evened(data.manifest, groups, seed=seed))
    _refuse(data, groups)
    data.manifest.write(folder / SPLIT_FILE)
    facts = _facts(data, report, given=split is not None)
    labels = _labels(
        data, groups, folder / FEATURES_FILE, pixels=facts.pixels, threads=threads, say=say
    )
    found = [*_findings(data, report), *_doubts(data, labels)]
    done = replace(
        facts,
        found={kind: n for kind in FINDINGS if (n := sum(one.kind == kind for one in found))},
        findings=tuple(_first(found)),
        labels=labels.facts(),
        notes=(*facts.notes, *labels.notes),
        pictures=tuple(_sheets(data, room, report, labels)),
        seconds=round(time.monotonic() - started, 1),
    )
    write(folder / CHECK_FILE, done)
    for line in printed(done):
        say(line)
    return done


def prepared(folder: Path) -> PreparedData:
    """The images and their parts, of a check that is finished.

    Raises:
        FileNotFoundError, DatasetError: there is none, or its images are gone.
    """
    found = read(folder / CHECK_FILE, DataCheck)
    root = Path(found.root)
    manifest = Manifest.read(folder / SPLIT_FILE, root=root)
    return PreparedData(found.name, found.kind, root, manifest, found.notes)


def features(folder: Path) -> tuple[NDArray[np.float16], dict[str, int]]:
    """Trained features ``(N, D)`` mapped into memory, and the row of each content key.

    Raises:
        FileNotFoundError: none were computed: the weights are not installed.
    """
    stored = read_features(folder / FEATURES_FILE)
    return stored.rows(), {key: row for row, key in enumerate(stored.keys)}


def printed(check: DataCheck) -> list[str]:
    """A few lines for a terminal."""
    total = sum(sum(counts) for counts in check.counts.values())
    parts = ", ".join(f"{check.images(part):,} {part}" for part in SPLITS)
    how = "as given" if check.given else "decided by content"
    lines = [
        f"{printable(check.name)}: {total:,} images of about {check.pixels} pixels, "
        f"{len(check.classes)} classes, the largest {check.imbalance:.3g} times the smallest",
        f"parts ({how}): {parts}",
    ]
    if check.found:
        lines.append("found: " + ", ".join(f"{n} {FINDINGS[k]}" for k, n in check.found.items()))
    if check.labels:
        lines.append(
            f"labels: {100 * check.labels['agree']:.1f} % agree with their {check.labels['asked']} "
            f"nearest neighbours in features of {check.labels['network']}"
        )
    lines += [f"note: {printable(note)}" for note in check.notes]
    return [*lines, f"the check took {format_seconds(check.seconds)}"]


def _prepared(
    root: Path | None, room: Path, name: str | None, *, split: Path | None, seed: int, threads: int
) -> tuple[PreparedData, dict[str, Any]]:
    """The images with their split, and what ``verify`` found in every file (as JSON)."""
    listing = None if root is None else scan(root)
    if listing is not None and listing.layout == "single" and len(listing.classes) > 1:
        _refuse_few(Counter(listing.counts()), {}, root)
    images = 0 if listing is None else len(listing.samples)
    workers = threads if images > 2000 and threads > 1 else 0
    # Its notes are said with ours; classes that miss a part are refused below, or noted.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        data = prepare_data(
            room, root=root, name=name, fractions=_shares(images), split_seed=seed, split=split,
            workers=workers, scenes={**SCENES, "seed": seed}, drop_leaks=True,
        )  # fmt: skip
    if split is not None:
        assert listing is not None, "a manifest of somebody is of a folder"
        verify(listing, workers=workers).write(room / VERIFY_FILE)
    return data, read_object(room / VERIFY_FILE)


def _shares(images: int) -> tuple[tuple[str, float], ...]:
    """Part -> share: of very many images fewer suffice to judge."""
    test = 0.2 if images < 50_000 else 0.1
    calibration = 0.1 if images < 200_000 else 0.05
    train = round(1 - calibration - test, 2)
    return (("train", train), ("calibration", calibration), ("test", test))


def _copy_groups(data: PreparedData, report: Mapping[str, Any]) -> dict[str, int]:
    """Path -> number of its group of copies (near ones, too); a number of its own for most."""
    paths = [entry.path for entry in data.manifest.entries]
    row = {path: n for n, path in enumerate(paths)}
    near, _ = bounded_groups(scan(data.root), report["duplicates_near"])
    links = [
        (row[group[0]], row[other])
        for found in (*report["duplicates_exact"], *near)
        if (group := [path for path in found if path in row])
        for other in group[1:]
    ]
    numbers = list(range(len(paths)))
    for group in join(links, len(paths)):
        for member in group:
            numbers[member] = group[0]
    return dict(zip(paths, numbers, strict=True))


def evened(manifest: Manifest, groups: Mapping[str, int], *, seed: int) -> Manifest:
    """Small classes dealt out by exact shares: at least one image in each part.

    A split by hash has the wanted shares on average; of eight images a part may get none. Order
    is by content all the same, and copies stay together. A group that holds several classes keeps
    its place.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for n, entry in enumerate(manifest.entries):
        members[groups[entry.path]].append(n)
    of_class: dict[int, list[list[int]]] = defaultdict(list)
    for rows in members.values():
        labels = {manifest.entries[n].label for n in rows}
        if len(labels) == 1:
            of_class[labels.pop()].append(rows)
    parts = [entry.split for entry in manifest.entries]
    small = [label for label, n in enumerate(_totals(manifest)) if 0 < n < SMALL]
    for label in small:
        own = sorted(
            of_class[label],
            key=lambda rows: place(seed, "even", min(manifest.entries[n].key for n in rows)),
        )
        for part, rows in _dealt(own):
            for n in rows:
                parts[n] = part
    entries = tuple(e._replace(split=p) for e, p in zip(manifest.entries, parts, strict=True))
    note = f"classes of fewer than {SMALL} images are split by exact shares, 60/15/25"
    notes = tuple(line for line in manifest.notes if "has no sample in part" not in line)
    return replace(manifest, entries=entries, notes=(*notes, note) if small else manifest.notes)


def _dealt(groups: Sequence[Sequence[int]]) -> Iterator[tuple[str, Sequence[int]]]:
    """Groups of one class with their parts; test and calibration are filled first."""
    total = sum(map(len, groups))
    left = {part: max(1, round(share * total)) for part, share in SMALL_SHARES if part != "train"}
    for n, rows in enumerate(groups):
        later = len(groups) - n - 1  # groups that the parts still empty need
        open_parts = [part for part in ("test", "calibration") if left[part] > 0]
        fits = [part for part in open_parts if len(rows) <= left[part]]
        part = fits[0] if fits else "train"
        if not fits and open_parts and later < len(open_parts):
            part = open_parts[0]
        if part != "train":
            left[part] -= len(rows)
        yield part, rows


def _totals(manifest: Manifest) -> list[int]:
    return [sum(column) for column in zip(*manifest.counts().values(), strict=True)]


def _refuse_few(files: Counter[str], different: Mapping[str, int], root: Path | None) -> None:
    """One line for classes with too few images to be in three parts."""
    counts = {name: different.get(name, n) for name, n in files.items()}
    few = [name for name, n in counts.items() if n < len(SPLITS)]
    if not few:
        return
    first, n = few[0], counts[few[0]]
    copies = f" ({files[first]} files; copies count once)" if n != files[first] else ""
    more = f", {len(few) - 1} more classes have too few" if len(few) > 1 else ""
    raise DatasetError(
        f"{root}: class {first!r} has {n} different images{copies}{more}: expected at least "
        f"{len(SPLITS)}, one each for {', '.join(SPLITS)}; add images or take the folder out"
    )


def _refuse(data: PreparedData, groups: Mapping[str, int]) -> None:
    """Refuse what cannot work, before anything long begins.

    Raises:
        DatasetError: parts that are missing or empty, a class that cannot be in all of them.
    """
    manifest = data.manifest
    missing = [part for part in SPLITS if part not in manifest.splits]
    if missing:
        raise DatasetError(
            f"the split has no part {missing[0]!r} (it has {', '.join(manifest.splits)}): "
            f"expected {', '.join(SPLITS)}"
        )
    counts = manifest.counts()
    if manifest.kind == "random":
        different: dict[int, set[int]] = defaultdict(set)
        for entry in manifest.entries:
            different[entry.label].add(groups[entry.path])
        files = Counter(dict(zip(manifest.classes, _totals(manifest), strict=True)))
        names = {name: len(different[label]) for label, name in enumerate(manifest.classes)}
        _refuse_few(files, names, data.root)
    bare = [c for c, n in zip(manifest.classes, counts["train"], strict=True) if not n]
    if bare:
        raise DatasetError(
            f"{data.root}: class {bare[0]!r} has no image to learn from (left out: broken files, "
            "copies of images that judge): expected some, or no folder of that class"
        )


def _facts(data: PreparedData, report: Mapping[str, Any], *, given: bool) -> DataCheck:
    """What needs no network."""
    manifest, sizes = data.manifest, report["sizes"]
    sides = np.array([min(map(int, size.split("x"))) for size in sizes] or [0])
    totals = _totals(manifest)
    return DataCheck(
        name=data.name,
        kind=data.kind,
        root=str(data.root.resolve()),
        classes=manifest.classes,
        counts={part: tuple(manifest.counts()[part]) for part in SPLITS},
        split_hash=manifest.hash,
        given=given or manifest.kind == "layout",
        pixels=int(np.median(np.repeat(sides, list(sizes.values()) or [1]))),
        notes=tuple(dict.fromkeys((*data.notes, *manifest.notes))),
        files={name: n for name, n in report["files"].items() if n},
        ignored=dict(report["ignored"]),
        sizes=dict(list(sizes.items())[:20]),
        imbalance=round(max(totals) / max(1, min(totals)), 2),
    )


def _findings(data: PreparedData, report: Mapping[str, Any]) -> Iterator[Finding]:
    """Files left out, copies, leaks and tiny classes."""
    for one in report["problems"]:
        if one["kind"] in ERRORS and one["kind"] != "wrong_classes":
            text = f"{ERRORS[one['kind']]}: {one['detail']}"
            yield Finding("left_out", (one["path"],), text)
        elif one["kind"] == "stray":
            yield Finding("left_out", (one["path"],), one["detail"])
    for kind, name in (("copy_exact", "duplicates_exact"), ("copy_near", "duplicates_near")):
        for group in report[name]:
            what = "the same bytes" if kind == "copy_exact" else "nearly the same picture"
            yield Finding(kind, tuple(group[:6]), f"{len(group)} files: {what}")
    yield from _leaks(data, report)
    for name, n in zip(data.classes, _totals(data.manifest), strict=True):
        if n < TINY:
            yield Finding("tiny_class", (name,), f"{n} images: what is said of it is a guess")


def _leaks(data: PreparedData, report: Mapping[str, Any]) -> Iterator[Finding]:
    """Files of training that have a copy in another part, and those left out for that reason."""
    for path, reason in data.manifest.quarantined.items():
        if reason.startswith("copy of a file in"):
            yield Finding("leak", (path,), f"left out: {reason}")
    part = {entry.path: entry.split for entry in data.manifest.entries}
    told: set[str] = set()
    for name, what in (("duplicates_exact", "an exact"), ("duplicates_near", "a near")):
        for group in report[name]:
            others = [path for path in group if part.get(path, "train") != "train"]
            for path in group if others else ():
                if part.get(path) == "train" and path not in told:
                    told.add(path)
                    text = f"{what} copy of it is in {part[others[0]]}"
                    yield Finding("leak", (path, others[0]), text)


@dataclass(frozen=True)
class _Labels:
    """The label check with what it ran on; ``checked`` is None where there are no weights."""

    entries: tuple[Entry, ...] = ()
    stored: StoredFeatures | None = None
    checked: LabelCheck | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        if self.checked is None or self.stored is None:
            return {}
        return {
            "agree": round(self.checked.agree, 4), "asked": self.checked.neighbours,
            "network": self.stored.network, "input_size": self.stored.input_size,
            "images": len(self.entries), "seconds": self.seconds,
        }  # fmt: skip


def _labels(
    data: PreparedData,
    groups: Mapping[str, int],
    file: Path,
    *,
    pixels: int,
    threads: int,
    say: Callable[[str], None],
) -> _Labels:
    """Trained features of every different image, and what its neighbours say of its label."""
    entries = list({entry.key: entry for entry in data.manifest.entries}.values())
    images = ImageSet.from_rows([(e.path, e.label, e.key) for e in entries], root=data.root)
    size = feature_size(len(entries), pixels)
    started = time.monotonic()
    try:
        run = trained_features(threads=threads)
    except UsageError as error:
        return _Labels(notes=(f"suspicious labels were not looked for: {error}",))
    say(f"features of {len(entries):,} images at {size} pixels")
    stored = store_features(run, images, file, input_size=size, threads=threads)
    checked = check_labels(
        stored.rows(),
        images.labels,
        num_classes=len(data.classes),
        groups=[groups[entry.path] for entry in entries],
    )
    seconds = round(time.monotonic() - started, 1)
    return _Labels(tuple(entries), stored, checked, (), seconds)


def _doubts(data: PreparedData, labels: _Labels) -> Iterator[Finding]:
    """Images whose neighbours bear another label, the most doubtful first."""
    for one in labels.checked.suspicious if labels.checked else ():
        given, likely = data.classes[one.label], data.classes[one.likely]
        text = f"given {given!r}, its neighbours are {likely!r} ({one.doubt:.2f})"
        yield Finding("label", (labels.entries[one.row].path,), text)


def _first(found: Sequence[Finding]) -> Iterator[Finding]:
    """The first ones of each kind."""
    seen: Counter[str] = Counter()
    for one in found:
        seen[one.kind] += 1
        if seen[one.kind] <= LISTED:
            yield one


def _sheets(
    data: PreparedData, room: Path, report: Mapping[str, Any], labels: _Labels
) -> Iterator[tuple[str, str]]:
    """Write the contact sheets; names and captions of those that show something."""
    doubted = labels.checked.suspicious if labels.checked else ()
    if doubted:
        tiles = [
            Tile(
                data.root / labels.entries[one.row].path,
                (
                    f"given: {data.classes[one.label]}",
                    f"like: {data.classes[one.likely]}",
                    Path(labels.entries[one.row].path).name,
                ),
            )
            for one in doubted[:SHOWN]
        ]
        write_sheet(room / "suspicious.jpg", tiles)
        yield (
            "suspicious.jpg",
            f"{len(tiles)} of {len(doubted)} images whose nearest neighbours bear another label "
            "than the one given; the most doubtful first",
        )
    copies = [group[:2] for group in (*report["duplicates_near"], *report["duplicates_exact"])]
    if copies:
        tiles = [
            Tile(data.root / path, (f"{n + 1}{'ab'[side]}: {Path(path).parent}", Path(path).name))
            for n, group in enumerate(copies[: SHOWN // 2])
            for side, path in enumerate(group)
        ]
        write_sheet(room / "copies.jpg", tiles)
        yield (
            "copies.jpg",
            f"two images of each of {len(tiles) // 2} of {len(copies)} groups of copies, near "
            "ones first",
        )
