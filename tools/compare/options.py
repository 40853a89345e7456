"""The command line of the journey, and what it means as one frozen dataclass."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compare.budget import KINDS, parse_budget
from compare.candidates import MAKERS
from compare.contract import Limit
from shared_core.runs.command import UsageError
from shared_core.runs.numbers import POSITIVE, SIZE
from shared_core.runs.options import CommandParser, add_common
from shared_core.runs.place import Start

BUILTIN_MINUTES, MINUTES = 2.5, 30.0
SHAPES = ("cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """What was asked for; None where the command leaves it open."""

    data_path: Path | None  # None: built-in scenes
    split: Path | None
    budget: tuple[Limit, ...]
    minutes: float
    candidates: tuple[str, ...]  # empty: the plan decides
    batch: int  # images at once
    shape: str
    seeds: int
    teacher: str | None
    output: Path
    seed: int
    threads: int
    start: Start
    retrain: Path | None
    compare_with: Path | None
    command: str


def build_parser(prog: str) -> CommandParser:
    """All options with their sentences."""
    p = CommandParser(
        prog=prog,
        description="From a folder of images and a budget to the smallest model that is good "
        "enough: checks the images, makes candidates, measures them alike on this machine, and "
        "ships the winner. Without --data-path it shows all of that on drawn scenes.",
        epilog="Results go to --output: report.html, winner/, judged.json, result.json. The same "
        "command goes on where it was stopped.",
    )
    g = p.add_argument_group("images")
    add_common(g, ["data-path", "split"])
    g = p.add_argument_group("what is wanted")
    g.add_argument("--budget", default="", metavar="WISHES", help=_budget_help())
    g.add_argument(
        "--batch", type=SIZE, default=1, metavar="N",
        help="How many images come at once where the model will run; the ms of the budget are "
        "those of an image at this batch.",
    )  # fmt: skip
    g.add_argument(
        "--shape", choices=SHAPES, default="cpu",
        help="Where the model will run, and so where it is timed.",
    )  # fmt: skip
    g.add_argument(
        "--compare-with", type=Path, metavar="MODEL",
        help="The folder of a model in use (an earlier winner/): what would change, image by "
        "image of the test part.",
    )  # fmt: skip
    g = p.add_argument_group("how it is sought")
    g.add_argument(
        "--minutes", type=POSITIVE, metavar="M",
        help=f"How long it may take, about (default: {MINUTES:g}; for drawn scenes "
        f"{BUILTIN_MINUTES:g}).",
    )  # fmt: skip
    g.add_argument(
        "--candidates", nargs="+", default=(), metavar="NAME",
        help=f"What is tried: {', '.join(MAKERS)}. Without it all that fit into the minutes, the "
        "cheapest useful ones first.",
    )  # fmt: skip
    g.add_argument(
        "--teacher", metavar="NETWORK",
        help="The network that teaches the students: any name of torchvision or timm whose "
        "trained weights can be had. Without it efficientnet_lite2.",
    )  # fmt: skip
    g.add_argument(
        "--seeds", type=SIZE, default=1, metavar="N",
        help="How often every training is repeated with another seed.",
    )  # fmt: skip
    g.add_argument(
        "--retrain", type=Path, metavar="RUN",
        help="The folder of an earlier run: its images keep their parts, images that have come "
        "since are learned from, and the old winner is compared with.",
    )  # fmt: skip
    g = p.add_argument_group("run")
    add_common(g, ["output", "seed", "threads", "continue", "fresh"], help={
        "continue": "Go on with the run in the output folder; that is done anyhow.",
        "seed": "The number that decides the split, first weights, order and augmentation.",
        "threads": "How many CPU threads learn, and answer where models are timed. Without it as "
        "many as this process may use.",
    })  # fmt: skip
    return p


def parse(argv: Sequence[str] | None, *, prog: str = "tools/compare/main.py") -> Options:
    """Read and check the command line.

    Raises:
        UsageError: words that contradict each other or name nothing.
    """
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    unknown = [name for name in args.candidates if name not in MAKERS]
    if unknown:
        raise UsageError(f"--candidates {unknown[0]}: expected some of {', '.join(MAKERS)}")
    if args.go_on and args.fresh:
        raise UsageError("--continue and --fresh contradict each other: expected one of them")
    for name, path in (("--compare-with", args.compare_with), ("--retrain", args.retrain)):
        if path is not None and not path.is_dir():
            raise UsageError(f"{name} {path}: there is no such folder")
    for name in ("split", "retrain"):
        if getattr(args, name) is not None and args.data_path is None:
            raise UsageError(f"--{name} is of images of your own: expected --data-path with it")
    if args.split is not None and args.retrain is not None:
        raise UsageError("--retrain brings the split of its run: expected no --split")
    minutes = args.minutes or (MINUTES if args.data_path is not None else BUILTIN_MINUTES)
    return Options(
        data_path=args.data_path,
        split=args.split,
        budget=parse_budget(args.budget),
        minutes=minutes,
        candidates=tuple(dict.fromkeys(args.candidates)),
        batch=args.batch,
        shape=args.shape,
        seeds=args.seeds,
        teacher=args.teacher,
        output=args.output or _usual_output(args),
        seed=args.seed,
        threads=args.threads or usable_threads(),
        start="fresh" if args.fresh else "continue",
        retrain=args.retrain,
        compare_with=args.compare_with,
        command=_typed(prog, argv),
    )


def usable_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _usual_output(args: argparse.Namespace) -> Path:
    name = "scenes" if args.data_path is None else args.data_path.resolve().name.partition(".")[0]
    again = "" if args.retrain is None else "-retrained"
    return Path("runs") / "compare" / f"{name or 'images'}{again}"


def _typed(prog: str, argv: Sequence[str] | None) -> str:
    import shlex
    import sys

    return shlex.join(["python", prog, *(sys.argv[1:] if argv is None else argv)])


def _budget_help() -> str:
    wishes = "; ".join(f"{what}{side} {means}" for what, (side, means) in KINDS.items())
    return f"What the winner must keep to, such as 'ms<=5 mb<=4'. {wishes}.".replace("%", "%%")
