"""The options of ``smallvision verify`` and ``prepare``; light, because ``--help`` comes here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_core.runs.numbers import COUNT, number
from shared_core.runs.options import CommandParser

SPEC = (
    "The name of a known data set, such as AID, whose facts the folder is compared with. An "
    "unknown name is refused with the list of those that are known."
)
WORKERS = (
    "How many processes decode. 0 works in this one. By default as many as there are cores, at "
    "most 8."
)
NEAR = "Do not look for images that are almost the same: re-encoded, rescaled, mirrored or turned."

NO_CACHE = (
    "Read every file again. By default a file whose path, size and time are those of an earlier "
    "check is not read; what was found then is kept in the folder SMALLVISION_CACHE, or below "
    "~/.cache."
)


@dataclass(frozen=True)
class VerifyOptions:
    """Which folder is checked, against what, and where the findings go."""

    root: Path
    spec: str | None
    workers: int | None
    near: bool
    report: Path | None
    quarantine: Path | None
    cache: bool


@dataclass(frozen=True)
class PrepareOptions:
    """What becomes a data set, where, and how it is split."""

    source: Path
    target: Path
    spec: str | None
    workers: int | None
    near: bool
    seed: int
    cache: bool
    scale_max: int | None


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", metavar="NAME", help=SPEC)
    parser.add_argument("--workers", type=COUNT, metavar="N", help=WORKERS)
    parser.add_argument("--no-near", action="store_true", help=NEAR)
    parser.add_argument("--no-cache", action="store_true", help=NO_CACHE)


def verify_options(argv: Sequence[str] | None, *, prog: str) -> VerifyOptions:
    """Parse the words of ``verify``; a mistake ends the program with exit code 2."""
    p = CommandParser(
        prog=prog,
        description="Decode every image of a folder of class folders and say what is wrong.",
        epilog="Exit code: 0 when the set can be used as it is, 1 when not, 2 for options that do "
        "not fit.",
    )
    p.add_argument(
        "root", type=Path, metavar="FOLDER",
        help="The folder with the images: one folder a class, or train/, val/ and test/ with class "
        "folders in each.",
    )  # fmt: skip
    _add_checks(p)
    p.add_argument(
        "--report", type=Path, metavar="FILE",
        help="Write everything that was found to this .json file, and as a page to .html and "
        ".md beside it.",
    )  # fmt: skip
    p.add_argument(
        "--quarantine", type=Path, metavar="FILE",
        help="Write the list of the files that cannot be used to this file.",
    )  # fmt: skip
    a = p.parse_args(argv)
    return VerifyOptions(
        a.root, a.spec, a.workers, not a.no_near, a.report, a.quarantine, not a.no_cache
    )


def prepare_options(argv: Sequence[str] | None, *, prog: str) -> PrepareOptions:
    """Parse the words of ``prepare``; a mistake ends the program with exit code 2."""
    p = CommandParser(
        prog=prog,
        description="Unpack an archive or copy a folder of images, check every file, and split.",
        epilog="Writes the images, verify.json, verify.md, verify.html, quarantine.txt and "
        "split.json. Stopped, the same command goes on.",
    )
    p.add_argument(
        "source", type=Path, metavar="SOURCE", help="A .zip, a .tar (.gz, .bz2, .xz), or a folder."
    )
    p.add_argument(
        "target", type=Path, metavar="TARGET", help="The folder that becomes the data set."
    )
    _add_checks(p)
    p.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
        help="The number that decides, with the content of the images, which go to which part. The "
        "default is 0.",
    )  # fmt: skip
    p.add_argument(
        "--scale-max", type=number(int, 1, 65535), metavar="N",
        help="The sample that is white in images of 16 bits, such as 4095 for a camera of 12 bits. "
        "They are replaced in TARGET by PNG files of 8 bits. By default they stay as they are, and "
        "65535 is white.",
    )  # fmt: skip
    a = p.parse_args(argv)
    return PrepareOptions(
        a.source, a.target, a.spec, a.workers, not a.no_near, a.seed, not a.no_cache, a.scale_max
    )
