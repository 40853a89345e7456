"""See an augmentation: a sheet with one image a row and its augmented views beside it.

python packages/torch_cls_zoo/dataloader/enhancement/preview.py IMAGES OUT.png [--policy my]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[4]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import cv2
import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets import decode, view_rng
from shared_core.runs import UsageError, run_command
from torch_cls_zoo.dataloader import POLICIES
from torch_cls_zoo.dataloader.enhancement.policies import make_augment
from torch_cls_zoo.dataloader.preprocess import preprocess

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
HEAD = 22  # pixels, the line with the column titles
GAP = 4  # pixels between pictures


def find_images(source: Path, number: int) -> list[Path]:
    """A file, or ``number`` files of a folder, evenly spread over its sorted list.

    Raises:
        FileNotFoundError: nothing there, or no image in the folder.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise FileNotFoundError(f"{source} holds no image ({', '.join(SUFFIXES)})")
    chosen = np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int)
    return [found[index] for index in chosen]


def contact_sheet(
    paths: Sequence[Path], *, policy: str, size: tuple[int, int], views: int, seed: int
) -> np.ndarray:
    """The pictures, one image a row: as it is, then ``views`` of its augmented views.

    Returns:
        uint8 RGB ``(H, W, 3)``.
    """
    augment = make_augment(policy)
    if augment is None:
        raise ValueError("no augmentation to show")
    rows = []
    for path in paths:
        image = decode(path)
        cells = [preprocess(image, size)]
        for number in range(views):
            drawn = augment(image, view_rng(seed, path.name, number))
            cells.append(preprocess(drawn, size))
        rows.append(np.concatenate([_framed(cell) for cell in cells], axis=1))
    sheet = np.concatenate([np.full((HEAD, rows[0].shape[1], 3), 255, np.uint8), *rows])
    step = size[1] + GAP
    for column in range(views + 1):
        text = "original" if column == 0 else f"{policy} {column}"
        place = (column * step + 2, HEAD - 7)
        cv2.putText(sheet, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return sheet


def _framed(cell: np.ndarray) -> np.ndarray:
    return cv2.copyMakeBorder(cell, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="preview.py", description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="an image, or a folder to take some from")
    parser.add_argument("out", type=Path, help="the sheet, .png or .jpg")
    parser.add_argument("--policy", default="my", choices=POLICIES)
    parser.add_argument("--image_size", type=int, nargs=2, default=[128, 128], metavar=("H", "W"))
    parser.add_argument("--rows", type=int, default=6, help="images of a folder")
    parser.add_argument("--views", type=int, default=7, help="augmented views of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.rows, args.views, *args.image_size) < 1:
        raise UsageError("--rows, --views and --image_size: expected at least 1 each")
    if args.out.suffix.lower() not in (".png", ".jpg"):
        raise UsageError(f"{args.out}: expected a name that ends in .png or .jpg")
    paths = find_images(args.images, args.rows)
    height, width = args.image_size
    sheet = contact_sheet(
        paths, policy=args.policy, size=(height, width), views=args.views, seed=args.seed
    )
    done, data = cv2.imencode(args.out.suffix.lower(), sheet[..., ::-1])
    if not done:
        raise ValueError(f"{args.out}: the picture cannot be encoded")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, lambda path: path.write_bytes(data.tobytes()))
    print(f"{len(paths)} images, {args.views} views each: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
