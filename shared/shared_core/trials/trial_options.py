"""The options of a sweep: which seeds, which part of the cells, which other folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared_core.runs.command import UsageError
from shared_core.runs.options import SEED, start_of
from shared_core.runs.place import Start


def add_trial_options(
    parser: argparse._ActionsContainer, *, seeds: Sequence[int] = (0, 1, 2)
) -> None:
    """Add ``--seeds``, ``--shard`` and ``--merge``."""
    add = parser.add_argument
    add(
        "--seeds", type=SEED, nargs="+", default=list(seeds), metavar="N",
        help="The seeds that every setting is tried with; differences are paired by them.",
    )  # fmt: skip
    add(
        "--shard", type=_shard, default=(1, 1), metavar="I/N",
        help="Do part I of N of the trials, for a job array of a cluster. The parts may share one "
        "output folder; the report is written when all trials are there. By default one process "
        "does everything.",
    )  # fmt: skip
    add(
        "--merge", type=Path, nargs="+", default=[], metavar="DIR",
        help="Take over the finished trials of these output folders, which other parts have "
        "written.",
    )  # fmt: skip


def check_trial_options(args: argparse.Namespace) -> Start:
    """Check them, and say how the sweep starts: a part of a sweep goes on or starts.

    Raises:
        UsageError: a seed twice; ``--fresh`` with a part of several; two ways to start.
    """
    if len(set(args.seeds)) != len(args.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: expected different numbers")
    start = start_of(args)
    if args.shard[1] > 1 and start == "fresh":
        raise UsageError("--fresh would delete what other parts do: expected no --shard with it")
    return "continue" if args.shard[1] > 1 and start == "new" else start


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N, such as 1/4 to 4/4")
    return int(index), int(count)
