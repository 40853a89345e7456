"""Turn a folder of images into features: a .npy file, the images' paths, and what made them."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]
if __name__ == "__main__":  # before torch: threads that hardly spin while they wait
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
from collections.abc import Sequence

from landmark_distill.embedder import Embedder, choose_device, list_images, load_embedder
from landmark_distill.feature_store import write_names
from landmark_distill.features import extract_features
from shared_core.datasets import ImageSet
from shared_core.runs import UsageError, run_command
from shared_core.runs.numbers import COUNT, SIZE


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a network is run."""
    parser.add_argument("--batch", type=SIZE, default=32, help="images a batch (default 32)")
    parser.add_argument("--num_workers", type=COUNT, default=2, help="decoding threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (model files)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (model files)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="embed.py",
        description="Write the unit-length feature of every image in a folder. Stopped, the same "
        "command goes on where it was.",
        epilog="Writes OUTPUT.npy (float32, N x D), OUTPUT.paths.txt (a path a line) and "
        "OUTPUT.json. Exit code: 0, or 1 when an image could not be read (the others are there).",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="max_acc.pth, or an exported folder")
    p.add_argument("folder", type=Path, metavar="FOLDER", help="images, in folders or not")
    p.add_argument("output", type=Path, metavar="OUTPUT", help="features to write, .npy")
    p.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32")
    add_model_options(p)
    return p


def embed_folder(
    embedder: Embedder,
    folder: Path,
    output: Path,
    *,
    batch: int = 32,
    threads: int = 2,
    dtype: str = "float32",
) -> list[tuple[Path, str]]:
    """Write features, paths and facts of a folder's images; returns what could not be read.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected one of images")
    files, bad = list_images([folder])
    names = [path.relative_to(folder).as_posix() for path in files]
    wrong = [(f, "a line break in its name") for f, n in zip(files, names, strict=True)
             if "\n" in n or "\r" in n]  # fmt: skip
    if wrong:
        bad += wrong
        kept = [i for i, name in enumerate(names) if "\n" not in name and "\r" not in name]
        files, names = [files[i] for i in kept], [names[i] for i in kept]
    if not files:
        raise FileNotFoundError(f"{folder} holds no image")
    images = ImageSet(files, [0] * len(files))
    done = extract_features(
        embedder,
        images,
        output,
        sight=embedder.sight,
        width=embedder.width,
        weights=embedder.weights,
        batch_size=batch,
        threads=threads,
        device=embedder.device,
        dtype=dtype,
        on_error="skip",
    )
    facts = {
        "root": str(folder.resolve()),
        "weights": embedder.weights,
        "architecture": embedder.architecture,
        "images": len(done.kept),
        "feature_dim": embedder.width,
        "unit_length": True,
        "unreadable": {names[index]: reason for index, reason in done.bad},
    }
    write_names(output, [names[i] for i in done.kept], facts)
    return bad + [(files[index], reason) for index, reason in done.bad]


def main(argv: Sequence[str] | None = None) -> int:
    """Embed a folder. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.output.suffix != ".npy":
        raise UsageError(f"{args.output}: expected a name that ends in .npy")
    embedder = load_embedder(args.model, device=choose_device(args.device), bf16=args.bf16)
    bad = embed_folder(
        embedder,
        args.folder,
        args.output,
        batch=args.batch,
        threads=args.num_workers,
        dtype=args.dtype,
    )
    for path, reason in bad:
        print(f"left out {path}: {reason}", file=sys.stderr)
    print(f"{args.output}: features of {args.folder}, {embedder.width} each")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
