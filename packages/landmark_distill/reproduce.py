"""The two recipes on data that anybody can have: teacher, students of three kinds, comparison."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse

from shared_core.runs import UsageError, run_command

SCALES = ("auto", "full", "short", "rehearsal")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from landmark_distill.recipes import RECIPES

    p = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Teach students through the teacher's frozen head, through heads of their own, "
        "and without a teacher, and compare them among classes that none has seen.",
        epilog="The published images, masks and teacher are not public: short runs on "
        "omniglot_small or a folder of yours, rehearsal on drawn scenes.",
    )
    p.add_argument("--recipe", choices=tuple(RECIPES), required=True)
    p.add_argument("--data-root", type=Path, default=Path("data"), help="holds omniglot_small/")
    p.add_argument("--data-path", type=Path, help="a folder of yours: coarse/fine/image or class")
    p.add_argument(
        "--scale",
        choices=SCALES,
        default="auto",
        help="full: published sizes, for --data-path; short: minutes on a CPU; rehearsal: drawn "
        "scenes; auto: short when there are images, else rehearsal",
    )
    p.add_argument("--output", type=Path, help="default: runs/landmark_distill/<recipe>-<scale>")
    p.add_argument("--teacher", type=Path, help="weights of a teacher, instead of training one")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--split-seed", type=int, default=0)
    p.add_argument(
        "--test-part",
        choices=("test", "validation"),
        default="test",
        help="validation: the unseen classes that settings are tuned on",
    )
    p.add_argument("--threads", type=int, help="of the CPU (default: the scale's)")
    p.add_argument("--device", default="auto")
    p.add_argument("--continue", dest="go_on", action="store_true", help="go on, or start")
    p.add_argument("--fresh", action="store_true", help="delete what --output holds")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and decide the scale and the data.

    Raises:
        UsageError: options that do not go together.
        FileNotFoundError: data that are named and not there.
    """
    from landmark_distill.repro_settings import STAND_IN

    args = build_parser().parse_args(argv)
    if args.fresh and args.go_on:
        raise UsageError("--fresh starts anew, --continue goes on: expected one of them")
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0 or len(args.seeds) < 2:
        raise UsageError(f"--seeds {args.seeds}: expected two or more different ones, from 0")
    if args.teacher is not None and not args.teacher.is_file():
        raise FileNotFoundError(f"--teacher {args.teacher}: there is no such file")
    if args.data_path is not None and not args.data_path.is_dir():
        raise FileNotFoundError(f"--data-path {args.data_path}: there is no such folder")
    found = args.data_path or args.data_root / STAND_IN
    if args.scale == "auto":
        args.scale = "short" if found.is_dir() else "rehearsal"
    if args.scale == "rehearsal":
        args.data = None
        if args.data_path is not None:
            raise UsageError("--scale rehearsal draws its scenes: expected no --data-path")
    else:
        args.data = found
        if args.scale == "full" and args.data_path is None:
            raise UsageError(
                f"--scale full has the published sizes, {STAND_IN} is too small for them: "
                "expected --data-path, or --scale short"
            )
        if not found.is_dir():
            raise FileNotFoundError(
                f"{found} is not there: expected {STAND_IN}/<alphabet>/<character>/*.png under "
                "--data-root (from github.com/brendenlake/omniglot), or --data-path"
            )
    if args.output is None:
        args.output = Path("runs") / "landmark_distill" / f"{args.recipe}-{args.scale}"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe at a scale. Returns the exit code."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = parse(argv)
    from landmark_distill.reproduction import reproduce

    reproduce(args, words=sys.argv[1:] if argv is None else list(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
