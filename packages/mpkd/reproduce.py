"""The matrix on CIFAR-10, ImageNet or digits: precision x distillation x temperature x seeds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from mpkd.experiments.parsing import add_sweep_options, sweep_options
from mpkd.experiments.recipes import MATRIX
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.options import CommandParser, choose_scale, words_of

SETS = ("cifar10", "imagenet")
NAMES = {"cifar10": "CIFAR-10", "imagenet": "ImageNet-1k"}  # of the core's table of sets


def build_parser() -> CommandParser:
    """The command line."""
    p = CommandParser(
        prog="reproduce.py",
        description="Precision x distillation: {fp32, bf16, int8 PTQ, int8 QAT, 4 bits, 2 bits, "
        "mixed 3 bits} x {labels, teacher alone at T = 1, 2, 4}, over seeds.",
        epilog="Writes result.json, report.md and report.html; goes on by cell.",
    )
    p.add_argument("target", choices=SETS, help="The images.")
    add_sweep_options(
        p, root="data", output="Without it runs/mpkd/<set>-<scale>.",
        scale="full takes a GPU or a day; short about an hour of a CPU; rehearsal takes "
        "scikit-learn's digits; auto is full where the images are found and else a rehearsal.",
    )  # fmt: skip
    p.add_argument(
        "--emulate-bf16", action="store_true",
        help="Train the bf16 row also where the hardware computes no bf16, several times as "
        "slowly; else it is left out there. A rehearsal always has it.",
    )  # fmt: skip
    return p


def is_there(target: str, root: Path) -> bool:
    """Whether a data set lies below ``root``."""
    from mpkd.dataset.sources import ARCHIVES
    from shared_core import datasets

    if datasets.find(root, datasets.get(NAMES[target])) is not None:
        return True
    others = ("cifar-10-batches-py", *ARCHIVES) if target == "cifar10" else ()
    return any((root / name).exists() for name in others)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix at a scale. Returns the exit code."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = build_parser().parse_args(argv)
    if args.data_path is not None and not args.data_path.exists():
        raise FileNotFoundError(f"--data-path {args.data_path}: there is nothing")
    there = args.scale == "auto" and (
        args.data_path is not None or is_there(args.target, args.data_root)
    )
    scale = choose_scale(args.scale, found=there)
    if scale == "rehearsal" and args.data_path is not None:
        raise UsageError("--scale rehearsal takes the digits: expected no --data-path")
    options = sweep_options(
        args, name="matrix", task=f"mpkd/{args.target}", script="reproduce.py",
        words=words_of(argv), setting=MATRIX[args.target, scale], scale=scale,
        data_key=f"dataset.data_dir_{args.target}", about={"target": args.target},
        output=Path("runs") / "mpkd" / f"{args.target}-{scale}",
    )  # fmt: skip
    from mpkd.experiments.matrix_page import run_matrix

    return run_matrix(options, emulate=args.emulate_bf16)


def cli() -> int:
    """The installed command ``mpkd-reproduce``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
