"""The recipes on data that anybody can have: teacher, students of three kinds, comparison."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from landmark_distill.recipes import PUBLISHED, RECIPES
from landmark_distill.reproducing.settings import ORIGINS, STAND_INS
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import COUNT
from shared_core.runs.options import CommandParser, add_common, words_of
from shared_core.trials.trial_options import add_trial_options, check_trial_options


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="reproduce.py",
        description="Teach students through the teacher's frozen head, through heads of their own, "
        "and without a teacher, and compare them among classes that none has seen.",
        epilog="The published images, masks and teacher are not public: short runs on "
        "omniglot_small (lite0: grocery192) or a folder of yours, rehearsal on drawn scenes.",
    )
    p.add_argument("--recipe", choices=tuple(RECIPES), required=True, help="Which student.")
    p.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR",
                   help="The folder that holds omniglot_small/ or grocery192/.")  # fmt: skip
    add_common(
        p,
        ("data-path", "scale", "output", "resume", "continue", "fresh", "threads", "device"),
        aliases={"data-path": ("--data_path",)},
        help={
            "data-path": "A folder of your own: coarse/fine/image or class/image.",
            "scale": "The size of the recipe. full is the published one, for --data-path; short "
            "takes minutes on a CPU; rehearsal takes drawn scenes; auto is short where there are "
            "images and else a rehearsal.",
            "output": "The folder of the sweep. Without it runs/landmark_distill/<recipe>-<scale>.",
            "threads": "How many CPU threads compute. Without it the scale decides.",
        },
        more={"threads": {"type": COUNT}},
    )
    p.add_argument("--teacher", type=Path, metavar="FILE",
                   help="The weights of a teacher, instead of training one.")  # fmt: skip
    add_trial_options(p)
    p.add_argument("--split-seed", type=COUNT, default=0, metavar="N",
                   help="The number that decides which classes are kept.")  # fmt: skip
    p.add_argument(
        "--test-part",
        choices=("test", "validation"),
        default="test",
        help="Which unseen classes judge. Settings are tuned on validation.",
    )
    return p


def images_of(args: argparse.Namespace) -> tuple[str, Path | None]:
    """The scale, ``auto`` decided, and the folder of images; None for drawn scenes.

    Raises:
        UsageError: options that do not go together.
        FileNotFoundError: data that are named and not there.
    """
    if args.data_path is not None and not args.data_path.is_dir():
        raise FileNotFoundError(f"--data-path {args.data_path}: there is no such folder")
    stand_in, inside = STAND_INS[args.recipe]
    found = args.data_path or args.data_root / stand_in
    scale = args.scale
    if scale == "auto":
        scale = "short" if found.is_dir() else "rehearsal"
    if scale == "rehearsal":
        if args.data_path is not None:
            raise UsageError("--scale rehearsal draws its scenes: expected no --data-path")
        return scale, None
    if scale == "full" and args.data_path is None and args.recipe in PUBLISHED:
        raise UsageError(
            f"--scale full has the published sizes, {stand_in} is too small for them: "
            "expected --data-path, or --scale short"
        )
    if not found.is_dir():
        raise FileNotFoundError(
            f"{found} is not there: expected {stand_in}/{inside} under --data-root (from "
            f"github.com/{ORIGINS[stand_in]}), or --data-path"
        )
    return scale, found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe at a scale. Returns the exit code."""
    args = build_parser().parse_args(argv)
    start = check_trial_options(args)
    if args.teacher is not None and not args.teacher.is_file():
        raise FileNotFoundError(f"--teacher {args.teacher}: there is no such file")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("reproduce.py runs in one process: expected --shard to share a sweep")
    scale, images = images_of(args)
    output = args.output or Path("runs") / "landmark_distill" / f"{args.recipe}-{scale}"
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from landmark_distill.reproducing.comparison import Asked, reproduce

    asked = Asked(
        recipe=args.recipe,
        scale=scale,
        images=images,
        output=output,
        teacher=args.teacher,
        seeds=tuple(args.seeds),
        split_seed=args.split_seed,
        test_part=args.test_part,
        threads=args.threads,
        device=args.device,
        start=start,
        shard=args.shard,
        merge=tuple(args.merge),
        command=shlex.join(["packages/landmark_distill/reproduce.py", *words_of(argv)]),
    )
    reproduce(asked)
    return 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
