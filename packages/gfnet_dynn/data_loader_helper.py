"""From a folder of images, or built-in scenes, to three splits and their loaders."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_core import datasets
from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.datasets.splitting.prepared import prepare_data as prepare_splits
from shared_core.for_torch.data import Normalizer, TorchLoader
from shared_core.runs import derive_seed

METHOD = {"bicubic": "cubic", "bilinear": "linear"}


@dataclass(frozen=True)
class Data(PreparedData):
    """A data set that is ready to train on, and the side of the network's input in pixels."""

    input_size: int = 0

    def facts(self, pixels: int | None = None) -> dict[str, Any]:
        """What a record says of the data."""
        return super().facts(pixels or self.input_size)


def prepare_data(args: argparse.Namespace, output: Path) -> Data:
    """Find or make the images, look at every file once, split them, and write it all down.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, or other classes than expected.
    """
    spec = datasets.get(args.data_set) if args.data_path and args.known_set else None
    rest = (1.0 - args.split_ratio) / 2
    found = prepare_splits(
        output,
        root=args.data_path,
        name=args.data_set if args.data_path else None,
        spec=spec,
        num_classes=args.num_classes,
        fractions=(("train", args.split_ratio), ("calibration", rest), ("test", rest)),
        split_seed=args.split_seed,
        quarantine=args.quarantine,
        workers=args.num_workers,
        scenes={
            "num_classes": args.builtin_classes,
            "image_size": args.input_size or 64,
            "images_per_class": args.builtin_images,
            "seed": derive_seed(args.seed, "scenes") % 2**31,
        },
    )
    size = args.input_size
    if not size:
        own = found.image_side()
        size = min(own, spec.image_size or own) if spec else own
    return Data(**vars(found), input_size=int(size))


def normalizer(device: object) -> Normalizer:
    """ImageNet mean and standard deviation, as the original's transforms."""
    return Normalizer(device=device)  # type: ignore[arg-type]


def train_loader(
    data: Data,
    args: argparse.Namespace,
    *,
    stage: str,
    batch_size: int,
    device: object,
    rank: int = 0,
    world_size: int = 1,
) -> TorchLoader:
    """Shuffled, augmented training batches; a view is decided by seed, stage, image and epoch.

    With several processes each gets its share of every batch: ``batch_size`` is that of one.
    """
    images = data.image_set("train")
    if len(images) < batch_size * world_size:
        raise datasets.DatasetError(
            f"{len(images)} training images make no batch of {batch_size * world_size}: expected "
            "at least one"
        )
    seed = derive_seed(args.seed, stage, "views")
    view = datasets.TrainView(
        data.input_size,
        scale=tuple(args.crop_scale),
        hflip=0.5,
        vflip=0.5 if args.vflip else 0.0,
        randaugment=None if args.aa == "none" else args.aa,
        color_jitter=args.color_jitter if args.color_jitter and args.aa == "none" else None,
        erasing=args.reprob,
        erasing_mode=args.remode,
        erasing_count=args.recount,
        seed=seed,
        method=METHOD[args.train_interpolation],
    )
    order = datasets.EpochOrder(
        len(images),
        seed=derive_seed(args.seed, stage, "order"),
        rank=rank,
        world_size=world_size,
        uneven="keep" if world_size == 1 else "drop",
    )
    loader = datasets.BatchLoader(
        images,
        view=view,
        batch_size=batch_size,
        order=order,
        threads=args.num_workers,
        drop_last=True,
    )
    return TorchLoader(loader, normalizer(device))


def eval_loader(
    data: Data,
    split: str,
    args: argparse.Namespace,
    *,
    device: object,
    batch_size: int = 128,
    rank: int = 0,
    world_size: int = 1,
) -> TorchLoader:
    """Every image of a split once, in order, resized and cut as ``--crop-pct`` says.

    Of several processes number r gets images r, r + ``world_size``, ...
    """
    view = datasets.EvalView(
        data.input_size,
        resize_ratio=1.0 / args.crop_pct,
        method=METHOD[args.train_interpolation],
    )
    images = data.image_set(split)
    if len(images) < world_size:
        raise datasets.DatasetError(
            f"{len(images)} images of the {split} split for {world_size} processes: expected one "
            "for each at least"
        )
    order = datasets.EpochOrder(len(images), shuffle=False, rank=rank, world_size=world_size)
    loader = datasets.BatchLoader(
        images, view=view, batch_size=batch_size, order=order, threads=args.num_workers
    )
    return TorchLoader(loader, normalizer(device))
