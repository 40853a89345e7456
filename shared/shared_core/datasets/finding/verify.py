"""Read every file of a data set once and say what is wrong with it: ``smallvision verify``."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from shared_core.dataset_options import VerifyOptions, verify_options
from shared_core.datasets.errors import DatasetError, DecodeError, UnsupportedImageError
from shared_core.datasets.finding import fingerprint
from shared_core.datasets.finding.look_cache import (
    Look,
    Stamp,
    cache_file,
    read_looks,
    stamp_of,
    write_looks,
)
from shared_core.datasets.finding.quarantine import (
    honoured,
    load_quarantine,
    read_quarantine,
    write_quarantine,
)
from shared_core.datasets.finding.scan import Listing, scan
from shared_core.datasets.finding.verify_report import Problem, VerifyReport
from shared_core.datasets.reading.decode import EncodedImage, read_bytes
from shared_core.datasets.reading.image_headers import kind_of
from shared_core.datasets.sets import specs
from shared_core.datasets.sets.spec_check import class_mismatch, describe_counts, describe_sizes
from shared_core.runs.command import run_command
from shared_core.runs.progress import progress
from shared_core.texts import say

__all__ = [
    "Problem",
    "VerifyReport",
    "load_quarantine",
    "read_quarantine",
    "verify",
    "write_quarantine",
]


NEAR_DISTANCE = 8  # bits of 64; candidates are confirmed by their thumbnails
NEAR_CORRELATION = 0.9  # of grey thumbnails, in [-1, 1]
_FORMATS = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".png": "png",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
    ".gif": "gif",
    ".avif": "avif",
}
_THUMB = 16  # pixels
_CHUNK = 32  # files a task


@dataclass(frozen=True)
class _Facts:
    """What one look at one file gives. A problem is (kind, detail)."""

    problems: tuple[tuple[str, str], ...]
    key: str = ""
    size: tuple[int, int] | None = None  # height, width in pixels
    hash: int = fingerprint.NO_STRUCTURE
    thumb: NDArray[np.float32] | None = None


def inspect_file(path: Path, *, near: bool = True) -> _Facts:
    """Look at one file: whole, an image, what its name says; its key, size, hash, thumbnail."""
    try:
        data = read_bytes(path)
    except OSError as error:
        gone = "a link to nothing" if path.is_symlink() else "no such file"
        return _Facts((("missing", error.strerror or gone),))
    except UnsupportedImageError as error:
        return _Facts((("unsupported", str(error).removeprefix(f"{path}: ")),))
    except DecodeError as error:
        return _Facts((("not_a_file", str(error).removeprefix(f"{path}: ")),))
    if not data:
        return _Facts((("empty", "0 bytes"),))
    key = fingerprint.key_of_bytes(data)
    kind = kind_of(data)
    if kind == "unknown":
        return _Facts((("not_an_image", f"starts with {data[:8]!r}"),), key)
    problems: list[tuple[str, str]] = []
    if kind != _FORMATS.get(path.suffix.lower()):
        problems.append(("wrong_extension", f"{path.suffix} holds {kind}"))
    try:
        # Strict: it checks containers and checksums, and has JPEGs that stop early refused.
        opened = EncodedImage(data, name="file")
        image = opened.pixels()
    except DatasetError as error:
        detail = " ".join(str(error).removeprefix("file: ").split())
        bad = "unsupported" if isinstance(error, UnsupportedImageError) else "truncated"
        return _Facts(((bad, detail), *problems), key)
    problems += opened.remarks
    size = (int(image.shape[0]), int(image.shape[1]))
    if not near:
        return _Facts(tuple(problems), key, size)
    return _Facts(
        tuple(problems),
        key,
        size,
        fingerprint.perceptual_hash(image),
        fingerprint.thumbnail(image, _THUMB),
    )


def _as_look(facts: _Facts) -> Look:
    found = [facts.problems, facts.key, facts.size, facts.hash]
    return json.dumps(found), b"" if facts.thumb is None else facts.thumb.tobytes()


def _from_look(look: Look) -> _Facts:
    problems, key, size, bits = json.loads(look[0])
    thumb = np.frombuffer(look[1], np.float32).reshape(_THUMB, _THUMB) if look[1] else None
    return _Facts(
        tuple((kind, detail) for kind, detail in problems),
        key,
        None if size is None else (size[0], size[1]),
        bits,
        thumb,
    )


def _look_at_all(
    paths: Sequence[Path], workers: int, near: bool, file: Path | None
) -> list[_Facts]:
    """Facts of all files in order; those that are as they were at an earlier look are not read."""
    places = [os.path.abspath(path) for path in paths]
    stamps = [stamp_of(path) if file else None for path in paths]
    asked = [(p, s) for p, s in zip(places, stamps, strict=True) if s is not None]
    known = {place: _from_look(look) for place, look in read_looks(file, asked).items()}
    # A look without the picture's hash does for a check without near copies only.
    known = {p: f for p, f in known.items() if not near or f.thumb is not None or f.size is None}
    facts: list[_Facts | None] = [known.get(place) for place in places]
    new = [n for n, fact in enumerate(facts) if fact is None]
    fresh: list[tuple[str, Stamp, Look]] = []
    seen = zip(new, _inspect_all([paths[n] for n in new], workers, near), strict=True)
    for n, fact in progress(seen, total=len(paths), label="verify", done=len(paths) - len(new)):
        facts[n] = fact
        stamp = stamps[n]
        if stamp is not None and fact.key:
            fresh.append((places[n], stamp, _as_look(fact)))
        if len(fresh) >= 5000:
            write_looks(file, fresh)
            fresh.clear()
    write_looks(file, fresh)
    return [fact for fact in facts if fact is not None]


def _inspect_chunk(paths: Sequence[Path], near: bool) -> list[_Facts]:
    return [inspect_file(path, near=near) for path in paths]


def _one_thread() -> None:
    cv2.setNumThreads(1)  # the processes are the parallelism


def _inspect_all(paths: Sequence[Path], workers: int, near: bool) -> Iterator[_Facts]:
    if workers == 0:
        for path in paths:
            yield inspect_file(path, near=near)
        return
    if not paths:
        return
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    # spawn: the same on every system, and no thread or lock of the caller is copied halfway.
    context = multiprocessing.get_context("spawn")
    done = 0
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            for facts in pool.map(_inspect_chunk, chunks, [near] * len(chunks)):
                yield from facts
                done += len(facts)
    except BrokenProcessPool:
        raise DatasetError(
            f"a worker process died at or after {paths[done]}; "
            "run with workers=0 to see at which file"
        ) from None
    except (OSError, ImportError, NotImplementedError) as error:
        # No shared memory, a read-only temporary folder, no semaphores: small machines.
        say(f"note: no worker processes here ({error}); one process works", sys.stderr)
        for path in paths[done:]:
            yield inspect_file(path, near=near)


def verify(
    listing: Listing,
    *,
    spec: specs.DatasetSpec | None = None,
    workers: int | None = None,
    near: bool = True,
    cache: bool = True,
) -> VerifyReport:
    """Decode every file and report what is wrong, copied, or other than the spec says.

    Args:
        listing: what ``scan`` found.
        spec: facts to compare with; what differs is reported.
        workers: processes; 0 does the work in this one; None takes the machine's cores, at most 8.
            With workers, a script that calls this needs the usual ``if __name__ == "__main__"``.
        near: also look for near duplicates (re-encoded, rescaled, brightened, mirrored or turned).
        cache: do not read files again that are as they were at an earlier call (same path, size and
            times). The findings are kept below the user's cache folder, if there is one.

    Raises:
        ValueError: ``workers`` is negative.
        DatasetError: a worker process died, or ``quarantine.txt`` is not understood.
    """
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 or more")
    names = [listing.relative(sample) for sample in listing.samples]
    paths = [sample.path for sample in listing.samples]
    facts = _look_at_all(paths, workers, near, cache_file() if cache else None)
    problems = [
        Problem(name, kind, detail)
        for name, fact in zip(names, facts, strict=True)
        for kind, detail in fact.problems
    ]
    problems += [Problem(name, "stray", "lies in no class folder") for name in listing.stray]
    problems += _missing_in_splits(listing)
    exact = _exact_groups(listing, facts)
    problems += _copy_problems(listing, names, exact)
    near_groups = _near_groups(facts, exact) if near else []
    differences = describe_counts(listing, spec) if spec is not None else []
    mismatch = class_mismatch(listing, spec) if spec is not None else None
    if mismatch is not None:
        problems.append(Problem(".", "wrong_classes", mismatch))
    sizes = Counter(fact.size for fact in facts if fact.size is not None)
    if spec is not None:
        differences += describe_sizes(sizes, spec)
    return VerifyReport(
        root=str(listing.root),
        layout=listing.layout,
        counts=listing.counts(),
        sizes={f"{h}x{w}": n for (h, w), n in sizes.most_common()},
        problems=tuple(sorted(problems, key=lambda p: (p.path, p.kind))),
        duplicates_exact=tuple(tuple(names[i] for i in group) for group in exact),
        duplicates_near=tuple(tuple(names[i] for i in group) for group in near_groups),
        near_checked=near,
        keys={name: fact.key for name, fact in zip(names, facts, strict=True) if fact.key},
        spec=spec.name if spec is not None else None,
        differences=tuple(differences),
        ignored=dict(listing.ignored),
        listed=tuple(honoured(load_quarantine(listing.root, None), names, where="")[0]),
    )


def _missing_in_splits(listing: Listing) -> list[Problem]:
    splits: dict[str, set[int]] = defaultdict(set)
    for sample in listing.samples:
        if sample.split is not None:
            splits[sample.split].add(sample.label)
    return [
        Problem(f"{split}/{name}", "class_missing", f"split {split!r} has no image of it")
        for split, present in splits.items()
        for label, name in enumerate(listing.classes)
        if label not in present
    ]


def _exact_groups(listing: Listing, facts: Sequence[_Facts]) -> list[list[int]]:
    by_key: dict[str, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if fact.key:
            by_key[fact.key].append(index)
    return [group for group in by_key.values() if len(group) > 1]


def _copy_problems(
    listing: Listing, names: Sequence[str], groups: Sequence[Sequence[int]]
) -> list[Problem]:
    problems = []
    for group in groups:
        labels = {listing.samples[i].label for i in group}
        splits = {listing.samples[i].split for i in group}
        for i in group:
            other = names[group[0] if i != group[0] else group[1]]
            if len(labels) > 1:
                problems.append(Problem(names[i], "copy_in_other_class", f"same bytes as {other}"))
            elif len(splits) > 1:
                problems.append(Problem(names[i], "copy_in_other_split", f"same bytes as {other}"))
            elif i != group[0]:
                problems.append(Problem(names[i], "copy", f"same bytes as {other}"))
    return problems


def _near_groups(facts: Sequence[_Facts], exact: Sequence[Sequence[int]]) -> list[list[int]]:
    """Near groups that are more than an exact group; exact copies count as connected."""
    pairs = fingerprint.near_pairs([f.hash for f in facts], NEAR_DISTANCE, symmetries=True)
    thumbs = np.stack(
        [f.thumb if f.thumb is not None else np.zeros((_THUMB, _THUMB), np.float32) for f in facts]
    )
    confirmed = fingerprint.confirm_pairs(pairs, thumbs, min_correlation=NEAR_CORRELATION)
    links = [(int(a), int(b)) for a, b in confirmed]
    links += [(group[0], other) for group in exact for other in group[1:]]
    known = {tuple(group) for group in exact}
    return [g for g in fingerprint.join(links, len(facts)) if tuple(g) not in known]


def run_verify(options: VerifyOptions) -> int:
    """Check a folder, print what was found, write what was asked for. Returns the exit code.

    Raises:
        DatasetError: no such folder, no class folders, an unknown spec.
        OSError: a report that cannot be written.
    """
    report = verify(
        scan(options.root),
        spec=specs.get(options.spec) if options.spec else None,
        workers=options.workers,
        near=options.near,
        cache=options.cache,
    )
    if options.report:
        report.write(options.report)
    if options.quarantine:
        write_quarantine(options.quarantine, report.quarantine())
    say(report.summary())
    return 0 if report.ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    prog = "python -m shared_core.datasets.finding.verify"
    return run_command(lambda words: run_verify(verify_options(words, prog=prog)), argv)


if __name__ == "__main__":
    sys.exit(main())
