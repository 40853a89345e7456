"""See an augmentation: a sheet with one image a row and its augmented views beside it.

python packages/torch_cls_zoo/dataloader/enhancement/preview.py IMAGES OUT.png [--policy my]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[4]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import UsageError, run_command
from shared_core.runs.numbers import SIZE
from shared_core.runs.options import CommandParser, add_common
from torch_cls_zoo.dataloader import POLICIES

if TYPE_CHECKING:
    import numpy as np

HEAD = 22  # pixels, the line with the column titles
GAP = 4  # pixels between pictures


def some_images(source: Path, number: int) -> list[Path]:
    """``number`` images of a file or folder, evenly spread over the sorted list.

    Raises:
        FileNotFoundError: no image there.
    """
    import numpy as np

    from shared_core.datasets.finding.scan import list_images

    found = list_images(source)
    if not found.files:
        path, reason = found.bad[0]
        raise FileNotFoundError(f"{path}: {reason}")
    last = len(found.files) - 1
    chosen = np.linspace(0, last, min(number, last + 1)).round().astype(int)
    return [found.files[index] for index in chosen]


def contact_sheet(
    paths: Sequence[Path], *, policy: str, size: tuple[int, int], views: int, seed: int
) -> np.ndarray:
    """The pictures, one image a row: as it is, then ``views`` of its augmented views.

    Returns:
        uint8 RGB ``(H, W, 3)``.
    """
    import cv2
    import numpy as np

    from shared_core.datasets import decode, view_rng
    from shared_core.datasets.views.evaluation import LetterboxView
    from torch_cls_zoo.dataloader.enhancement.policies import make_augment

    def framed(cell: np.ndarray) -> np.ndarray:
        white = (255, 255, 255)
        return cv2.copyMakeBorder(cell, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=white)

    augment, view = make_augment(policy), LetterboxView(size)
    if augment is None:
        raise ValueError("no augmentation to show")
    rows = []
    for path in paths:
        image = decode(path)
        cells = [view(image)]
        for number in range(views):
            drawn = augment(image, view_rng(seed, path.name, number))
            cells.append(view(drawn))
        rows.append(np.concatenate([framed(cell) for cell in cells], axis=1))
    sheet = np.concatenate([np.full((HEAD, rows[0].shape[1], 3), 255, np.uint8), *rows])
    step = size[1] + GAP
    for column in range(views + 1):
        text = "original" if column == 0 else f"{policy} {column}"
        place = (column * step + 2, HEAD - 7)
        cv2.putText(sheet, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog="preview.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("images", type=Path, help="An image, or a folder to take some from.")
    add("out", type=Path, help="The sheet to write, .png or .jpg.")
    add("--policy", default="my", choices=POLICIES, help="The augmentation to show.")
    add("--image_size", type=SIZE, nargs=2, default=[128, 128], metavar=("H", "W"),
        help="The height and width of each picture, in pixels.")  # fmt: skip
    add("--rows", type=SIZE, default=6, metavar="N", help="How many images of a folder.")
    add("--views", type=SIZE, default=7, metavar="N", help="How many augmented views of each.")
    add_common(parser, ["seed"], help={"seed": "The number that decides the draws."})
    args = parser.parse_args(argv)
    ending = args.out.suffix.lower()
    if ending not in (".png", ".jpg"):
        raise UsageError(f"{args.out}: expected a name that ends in .png or .jpg")
    import cv2

    from shared_core.checkpoints import atomic_write

    paths = some_images(args.images, args.rows)
    sheet = contact_sheet(
        paths, policy=args.policy, size=tuple(args.image_size), views=args.views, seed=args.seed
    )
    done, data = cv2.imencode(ending, sheet[..., ::-1])
    if not done:
        raise ValueError(f"{args.out}: the picture cannot be encoded")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, lambda path: path.write_bytes(data.tobytes()))
    print(f"{len(paths)} images, {args.views} views each: {args.out}")
    return 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
