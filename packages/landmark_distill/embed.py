"""Turn a folder of images into features: a .npy file, the images' paths, and what made them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import number
from shared_core.runs.options import CommandParser, add_common


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a network is run."""
    add_common(
        parser,
        ("batch-size", "workers", "device"),
        defaults={"batch-size": 32, "workers": 2},
        aliases={"batch-size": ("--batch",), "workers": ("--num_workers",)},
        help={
            "batch-size": "How many images are computed together.",
            "device": "Where to compute: auto for a GPU where there is one, cpu, cuda or cuda:1.",
        },
    )
    parser.add_argument(
        "--bf16", action="store_true", help="Compute in bfloat16; for a model file."
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="embed.py",
        description="Write the unit-length feature of every image in a folder. Stopped, the same "
        "command goes on where it was.",
        epilog="Writes OUTPUT.npy (float32, N x D), OUTPUT.paths.txt (a path a line) and "
        "OUTPUT.json. Exit code: 0, or 1 when an image could not be read (the others are there).",
    )
    one = p.add_argument
    one("model", type=Path, metavar="MODEL", help="max_acc.pth, or a folder of export_model.py.")
    one("folder", type=Path, metavar="FOLDER", help="Images, in folders or not.")
    one("output", type=Path, metavar="OUTPUT", help="The features to write, .npy.")
    one("--dtype", choices=("float16", "float32", "float64"), default="float32",
        help="The precision of the features.")  # fmt: skip
    one("--far", type=number(float, 0, 1, open_low=True), metavar="F",
        help="Store the score below which search.py says unknown, so that at most this share of "
        "images whose class is not in the gallery is accepted. The folders name the classes.",
        )  # fmt: skip
    add_model_options(p)
    return p


def _store_threshold(output: Path, far: float) -> str:
    """Find the score below which a query is unknown, and keep it beside the features."""
    from landmark_distill.gallery.features import open_store, write_names
    from landmark_distill.gallery.unknown import unknown_threshold

    store = open_store(output)
    found = unknown_threshold(store.features, store.paths, far=far)
    write_names(output, store.paths, {**store.facts, "unknown": found})
    score = "-" if found["threshold"] is None else f"{found['threshold']:.4f}"
    few = ", too few for this rate" if found["threshold"] is None else ""
    return (
        f"unknown at or below {score}: a share of {far:g} of images of absent classes is accepted "
        f"({found['images']} images of {found['classes']} classes{few})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Embed a folder. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.output.suffix != ".npy":
        raise UsageError(f"{args.output}: expected a name that ends in .npy")
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from landmark_distill.gallery.embedder import load_embedder
    from landmark_distill.gallery.features import embed_folder

    embedder = load_embedder(args.model, device=args.device, bf16=args.bf16)
    width, bad = embed_folder(
        embedder,
        args.folder,
        args.output,
        batch=args.batch_size,
        threads=args.workers,
        dtype=args.dtype,
    )
    for path, reason in bad:
        print(f"left out {path}: {reason}", file=sys.stderr)
    if args.far is not None:
        print(_store_threshold(args.output, args.far))
    print(f"{args.output}: features of {args.folder}, {width} each")
    return 1 if bad else 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
