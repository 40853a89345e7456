"""A small data folder to try the commands on: drawn scenes in train, val and test folders.

python packages/torch_cls_zoo/utils/builtin_data.py FOLDER [--classes 3] [--images 20]
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import UsageError, run_command
from shared_core.runs.numbers import SIZE
from shared_core.runs.options import CommandParser, add_common

SHARES = {"train": 3, "val": 1, "test": 1}  # of five


def make_folder(
    root: Path, *, classes: int = 3, images: int = 20, size: int = 64, seed: int = 0
) -> dict[str, int]:
    """Write the scenes, all or nothing.

    Args:
        root: must not exist, or be empty.
        classes: 2 to 45.
        images: of each class, all parts together; at least 5.
        size: pixels.

    Returns:
        The number of images of each part.

    Raises:
        UsageError: the folder holds something, or too few images.
    """
    from shared_core.datasets import make_scenes

    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} is there already, expected a new or empty folder")
    if images < sum(SHARES.values()):
        raise UsageError(f"{images} images a class, expected at least {sum(SHARES.values())}")
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = root.parent / f".{root.name}.making-{os.getpid()}"
    try:
        listing = make_scenes(
            scratch / "all",
            num_classes=classes,
            image_size=size,
            images_per_class=images,
            seed=seed,
        )
        counts = dict.fromkeys(SHARES, 0)
        for sample in listing.samples:
            number = int(sample.path.stem) * sum(SHARES.values()) // images
            part = "train" if number < 3 else ("val" if number == 3 else "test")
            target = scratch / "parts" / part / listing.classes[sample.label] / sample.path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            sample.path.rename(target)
            counts[part] += 1
        if root.exists():
            root.rmdir()
        (scratch / "parts").rename(root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog="builtin_data.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="The folder to make; it must be new or empty.")
    add("--classes", type=SIZE, default=3, metavar="N", help="How many classes, 2 to 45.")
    add("--images", type=SIZE, default=20, metavar="N", help="How many images of each class.")
    add("--size", type=SIZE, default=64, metavar="PIXELS", help="The side of the images.")
    add_common(parser, ["seed"], help={"seed": "The number that decides what is drawn."})
    args = parser.parse_args(argv)
    counts = make_folder(
        args.folder, classes=args.classes, images=args.images, size=args.size, seed=args.seed
    )
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f": {args.folder}")
    return 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
