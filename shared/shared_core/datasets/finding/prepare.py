"""A zip, a tar or a folder becomes a checked data set with its split: ``smallvision prepare``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2

from shared_core.checkpoints.atomic import atomic_write
from shared_core.dataset_options import PrepareOptions, prepare_options
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.quarantine import FILE_NAME, write_quarantine
from shared_core.datasets.finding.scan import Listing, scan
from shared_core.datasets.finding.unpack import Limits, unpack
from shared_core.datasets.finding.verify import verify
from shared_core.datasets.finding.verify_report import VerifyReport
from shared_core.datasets.reading.decode import EncodedImage, read_bytes
from shared_core.datasets.sets import specs
from shared_core.datasets.sets.spec_check import class_mismatch
from shared_core.datasets.splitting.manifest import Manifest
from shared_core.datasets.splitting.split import FRACTIONS, Fractions, from_layout, make_split
from shared_core.runs.command import run_command
from shared_core.texts import say


@dataclass(frozen=True)
class Prepared:
    """The folder, what the check found, and the split (written to ``root/split.json``)."""

    root: Path
    report: VerifyReport
    manifest: Manifest


def prepare(
    source: str | Path,
    target: str | Path,
    *,
    spec: specs.DatasetSpec | None = None,
    fractions: Fractions = FRACTIONS,
    seed: int = 0,
    keep_layout: bool = True,
    workers: int | None = None,
    near: bool = True,
    limits: Limits | None = None,
    cache: bool = True,
    scale_max: int | None = None,
) -> Prepared:
    """Unpack, verify and split. Called again after a crash, it goes on where it was.

    Writes below ``target``: the images, ``verify.json``, ``.md`` and ``.html``, ``quarantine.txt``
    (files that cannot be used; splits leave them out) and ``split.json``.

    Args:
        source: a .zip, a .tar (.gz, .bz2, .xz), or a folder, which is copied.
        target: the data set's folder; absent, empty, or one that this source was unpacked to.
        spec: facts to compare with.
        fractions, seed: of the split.
        keep_layout: take train/val/test folders as given (``from_layout``), if there are any.
        workers, near, cache: as in ``verify``.
        scale_max: the white of images of 16 bits, which become PNG files of 8 bits; None leaves
            them.
        limits: what an archive may expand to.

    Raises:
        DatasetError: an archive that escapes its folder, holds links, is damaged or too large; a
            target in use; no class folders inside; classes other than the spec's.
        DatasetNotFoundError: no such source.
    """
    root = unpack(source, target, limits=limits or Limits())
    listing = scan(root)
    if scale_max is not None:
        _scale(listing, scale_max)
        listing = scan(root)
    if spec is not None and (mismatch := class_mismatch(listing, spec)):
        raise DatasetError(f"{source} is not {spec.name}: {mismatch}")
    report = verify(listing, spec=spec, workers=workers, near=near, cache=cache)
    report.write(root / "verify.json")
    quarantine = report.quarantine()
    write_quarantine(root / FILE_NAME, quarantine)
    if keep_layout and listing.layout == "split":
        manifest = from_layout(listing, seed=seed, quarantine=quarantine, keys=report.keys)
    else:
        manifest = make_split(
            listing,
            fractions=fractions,
            seed=seed,
            duplicates=report.duplicates,
            quarantine=quarantine,
            keys=report.keys,
        )
    manifest.write(root / "split.json")
    return Prepared(root, report, manifest)


def _scale(listing: Listing, scale_max: int) -> None:
    """Replace images of 16 bits by PNG files of 8 bits; what cannot be read is told later."""
    for sample in listing.samples:
        path = sample.path
        try:
            image = EncodedImage(read_bytes(path), name=str(path), scale_max=scale_max)
        except (DatasetError, OSError):
            continue
        if not image.deep:
            continue
        target = path.with_suffix(".png")
        if target != path and target.exists():
            target = path.with_name(f"{path.name}.png")
        data = cv2.imencode(".png", image.pixels()[..., ::-1])[1].tobytes()
        atomic_write(target, lambda scratch, data=data: scratch.write_bytes(data))  # type: ignore[misc]
        if target != path:
            path.unlink()


def run_prepare(options: PrepareOptions) -> int:
    """Prepare a set and print what was found. Returns the exit code.

    Raises:
        DatasetError: what :func:`prepare` refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the manifest's notes are printed below
        done = prepare(
            options.source,
            options.target,
            spec=specs.get(options.spec) if options.spec else None,
            seed=options.seed,
            workers=options.workers,
            near=options.near,
            cache=options.cache,
            scale_max=options.scale_max,
        )
    say(done.report.summary())
    say(done.manifest.summary())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    prog = "python -m shared_core.datasets.finding.prepare"
    return run_command(lambda words: run_prepare(prepare_options(words, prog=prog)), argv)


if __name__ == "__main__":
    sys.exit(main())
