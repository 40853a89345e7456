"""The zoo's loader against torchvision's ImageFolder + DataLoader: letterbox, AutoAugment, cache.

Both fit the same JPEG files (256 px, about 15 KB) into 224 x 224 with padding, normalise them on
the CPU and use two workers (threads here, processes there); rounds are interleaved. torchvision's
side is a letterbox of Resize and Pad on PIL images, and its own AutoAugment.

    python tools/bench/zoo_loader.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).parent), str(REPOSITORY / "packages"),
                    str(REPOSITORY / "shared")]  # fmt: skip

import cv2
import numpy as np
import torch
from loader import BATCH, WORKERS, Run, make_files, row

from shared_core.datasets import DecodedCache, ImageSet
from shared_core.datasets.views.geometry import letterbox_box
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD
from shared_core.for_torch.distributed import World
from shared_core.runs import write_benchmark
from torch_cls_zoo.dataloader.loaders import InputSettings, train_loader

SIZE = (224, 224)


class PilLetterbox:
    """What a user of torchvision would write: Resize, then Pad."""

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms import functional as F  # noqa: N812

        top, left, height, width = letterbox_box((image.height, image.width), SIZE)
        small = F.resize(image, [height, width])
        margins = [left, top, SIZE[1] - width - left, SIZE[0] - height - top]
        return F.pad(small, margins)


def torchvision_run(root: Path, images: int, *, augment: bool) -> Run:
    """ImageFolder and DataLoader with two processes that live through all rounds."""
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.RandomHorizontalFlip()] if augment else []
    if augment:
        steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET, fill=[0, 0, 0]))
    steps += [PilLetterbox(), transforms.ToTensor()]
    steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    folder = datasets.ImageFolder(str(root), transforms.Compose(steps))
    repeated = torch.utils.data.Subset(folder, [n % len(folder) for n in range(images)])
    loader = torch.utils.data.DataLoader(
        repeated, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: sum(len(labels) for _images, labels in loader)


def our_run(images: ImageSet, *, policy: str | None) -> Run:
    """The zoo's training loader, normalised."""
    loader = train_loader(
        images,
        InputSettings(SIZE),
        batch_size=BATCH,
        policy=policy,
        seed=0,
        world=World(0, 1, 0, torch.device("cpu")),
        threads=WORKERS,
    )
    return lambda: sum(len(batch.labels) for batch in loader)


def check(root: Path, images: ImageSet) -> str:
    """Mean difference of our letterboxed inputs from torchvision's, of 255 levels."""
    from PIL import Image
    from torchvision import transforms

    loader = train_loader(
        images.subset(range(8)), InputSettings(SIZE, (0.0,) * 3, (1.0,) * 3), batch_size=8,
        policy=None, seed=0, world=World(0, 1, 0, torch.device("cpu")), threads=0,
    )  # fmt: skip
    batch = next(iter(loader))
    worst = 0.0
    for index, mine in zip(batch.indices.tolist(), batch.images, strict=True):
        theirs = PilLetterbox()(Image.open(images.name(index)).convert("RGB"))
        difference = (mine - transforms.ToTensor()(theirs)).abs().mean()
        worst = max(worst, float(difference) * 255)
    if worst > 4.0:
        raise ValueError(f"letterboxed inputs differ by {worst:.2f} of 255 levels on average")
    return f"same place, mean difference at most {worst:.1f} of 255 levels (other smoothing)"


def run_all(folder: Path, *, quick: bool, rounds: int) -> list[dict[str, Any]]:
    """All rows; the first column is ours, the second torchvision's."""
    number, epoch = (32, 128) if quick else (256, 768)
    root = folder / "images"
    paths = [str(path) for path in make_files(root, 256, number)]
    keys = [n % number for n in range(epoch)]
    files = ImageSet([paths[n] for n in keys], np.zeros(epoch, np.int64), keys)
    cache = DecodedCache.build(files, folder / "cache")
    equal = check(root, files)
    plain = torchvision_run(root, epoch, augment=False)
    rows = [
        row("letterbox, files", our_run(files, policy=None), plain, rounds, equal),
        row("letterbox, cache", our_run(files.with_source(cache), policy=None), plain, rounds,
            equal),
    ]  # fmt: skip
    del plain
    drawn = torchvision_run(root, epoch, augment=True)
    same = "the same operations and policy, other draws; then as above"
    rows.append(row("AutoAugment, files", our_run(files, policy="imagenet"), drawn, rounds, same))
    other = "not the same work: MyAugment here, AutoAugment there"
    rows.append(row("MyAugment, files", our_run(files, policy="my"), drawn, rounds, other))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whatever comes out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 7; quick 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    rounds = options.rounds or (2 if options.quick else 7)
    torch.set_num_threads(WORKERS)
    cv2.setNumThreads(1)  # the loader's threads are the parallelism, as in the other's processes
    with tempfile.TemporaryDirectory(prefix="bench-zoo-loader-") as folder:
        rows = run_all(Path(folder), quick=options.quick, rounds=rounds)
    if options.json:
        write_benchmark(options.json, topic="zoo_loader", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
