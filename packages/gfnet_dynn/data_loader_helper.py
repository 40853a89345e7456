"""From a folder of images, or built-in scenes, to three splits and their loaders."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from shared_core import datasets
from shared_core.datasets.quarantine import load_quarantine
from shared_core.datasets.spec_check import describe
from shared_core.datasets.verify import verify
from shared_core.for_torch.data import Normalizer, TorchLoader
from shared_core.runs import derive_seed

SPLIT_FILE, VERIFY_FILE, QUARANTINE_FILE = "split.json", "verify.json", "quarantine.txt"
METHOD = {"bicubic": "cubic", "bilinear": "linear"}


@dataclass(frozen=True)
class Data:
    """A data set that is ready to train on."""

    name: str
    kind: str  # "real", "subset" (not all the images that the set is known to have) or "built-in"
    root: Path
    manifest: datasets.Manifest
    input_size: int  # pixels
    notes: tuple[str, ...]  # what differs from the published data set

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.manifest.classes

    def image_set(self, split: str) -> datasets.ImageSet:
        """The images of ``train``, ``calibration`` or ``test``."""
        items = self.manifest.subset(split)
        if not items:
            raise datasets.DatasetError(f"{self.root}: the {split} split is empty, expected images")
        return datasets.ImageSet(
            [self.root / item.path for item in items],
            [item.label for item in items],
            [item.key for item in items],
        )

    def facts(self) -> dict[str, object]:
        """What a record says of the data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "images": len(self.manifest.entries),
            "pixels": self.input_size,
            "split_hash": self.manifest.hash,
            "splits": {s: len(self.manifest.subset(s)) for s in self.manifest.splits},
            "notes": list(self.notes),
        }


def _image_side(path: Path) -> int:
    """The short side of one image, pixels."""
    height, width = datasets.decode(path).shape[:2]
    return int(min(height, width))


def prepare_data(args: argparse.Namespace, output: Path) -> Data:
    """Find or make the images, look at every file once, split them, and write it all down.

    A file that cannot be read is left out and listed in ``quarantine.txt``; copies and near copies
    stay in one split. When ``output`` holds a split already, that one is read and checked.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, or other classes than expected.
    """
    builtin = args.data_path is None
    spec, notes = None, []
    if builtin:
        root = output / "data" / "scenes"
        size = args.input_size or 64
        listing = datasets.make_scenes(
            root,
            num_classes=args.builtin_classes,
            image_size=size,
            images_per_class=args.builtin_images,
            seed=derive_seed(args.seed, "scenes") % 2**31,
        )
        name = "built-in scenes"
    else:
        root, name = args.data_path, args.data_set
        if args.known_set:
            spec = datasets.get(args.data_set)
        listing = datasets.scan(root)
        if spec is not None:
            if len(listing.classes) != spec.num_classes:
                raise datasets.DatasetError(
                    f"{root} has {len(listing.classes)} class folders, {spec.name} has "
                    f"{spec.num_classes}: give it another name by --data-set"
                )
            notes = describe(listing, spec)
    if len(listing.classes) < 2:
        raise datasets.DatasetError(
            f"{root} has one class, {listing.classes[0]!r}: expected two or more class folders"
        )
    if args.num_classes and args.num_classes != len(listing.classes):
        raise datasets.DatasetError(
            f"{root} has {len(listing.classes)} classes, --num_classes says {args.num_classes}"
        )
    split_file = output / SPLIT_FILE
    if split_file.exists():
        manifest = datasets.Manifest.read(split_file, root=root)
    else:
        manifest = _split(args, listing, spec, output)
        manifest.write(split_file)
    kind = "built-in" if builtin else "real"
    if spec is not None and spec.num_images and len(manifest.entries) < spec.num_images:
        kind = "subset"
    own = _image_side(Path(root) / manifest.entries[0].path)
    size = args.input_size or (min(own, spec.image_size or own) if spec else own)
    data = Data(name, kind, Path(root), manifest, int(size), tuple(notes))
    for split in ("train", "calibration", "test"):
        data.image_set(split)  # an empty one is told now, not after an hour
    return data


def _split(
    args: argparse.Namespace,
    listing: datasets.Listing,
    spec: datasets.DatasetSpec | None,
    output: Path,
) -> datasets.Manifest:
    """Verify every file and make the split."""
    report = verify(listing, spec=spec, workers=args.num_workers if args.num_workers > 1 else 0)
    report.write(output / VERIFY_FILE)
    quarantine = report.quarantine() | load_quarantine(listing.root, args.quarantine)
    if quarantine:
        datasets.write_quarantine(output / QUARANTINE_FILE, quarantine)
        first = next(iter(quarantine.items()))
        print(
            f"left out {len(quarantine)} files ({first[0]}: {first[1]}); "
            f"all are in {output / QUARANTINE_FILE}",
            file=sys.stderr,
        )
    if listing.layout == "split":
        return datasets.from_layout(listing, seed=args.split_seed, quarantine=quarantine)
    rest = (1.0 - args.split_ratio) / 2
    return datasets.make_split(
        listing,
        fractions=(("train", args.split_ratio), ("calibration", rest), ("test", rest)),
        seed=args.split_seed,
        duplicates=report.duplicates,
        quarantine=quarantine,
        keys=report.keys,
        gaps="fill",
    )


def normalizer(device: object) -> Normalizer:
    """ImageNet mean and standard deviation, as the original's transforms."""
    return Normalizer(device=device)  # type: ignore[arg-type]


def train_loader(
    data: Data, args: argparse.Namespace, *, stage: str, batch_size: int, device: object
) -> TorchLoader:
    """Shuffled, augmented training batches; a view is decided by seed, stage, image and epoch."""
    images = data.image_set("train")
    if len(images) < batch_size:
        raise datasets.DatasetError(
            f"{len(images)} training images make no batch of {batch_size}: expected at least one"
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
    order = datasets.EpochOrder(len(images), seed=derive_seed(args.seed, stage, "order"))
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
    data: Data, split: str, args: argparse.Namespace, *, device: object, batch_size: int = 128
) -> TorchLoader:
    """Every image of a split once, in order, resized and cut as ``--crop-pct`` says."""
    view = datasets.EvalView(
        data.input_size,
        resize_ratio=1.0 / args.crop_pct,
        method=METHOD[args.train_interpolation],
    )
    loader = datasets.BatchLoader(
        data.image_set(split), view=view, batch_size=batch_size, threads=args.num_workers
    )
    return TorchLoader(loader, normalizer(device))
