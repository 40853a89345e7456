"""The images of an experiment: found, checked and split once, decoded once, for all its runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from shared_core import datasets
from shared_core.datasets import DecodedCache, ImageSet
from shared_core.datasets.splitting.prepared import PreparedData, prepare_data
from shared_core.runs import UsageError
from torch_cls_zoo.experiments.recipes import Recipe

DATA_SET = "clothing-10"
SCENE_SIDE = 48  # pixels of drawn scenes


@dataclass(frozen=True)
class CachedData(PreparedData):
    """Data whose pixels come from a decoded cache."""

    cache: DecodedCache | None = None

    def image_set(self, split: str) -> ImageSet:
        """The images of a part, from the cache."""
        plain = super().image_set(split)
        return plain if self.cache is None else plain.with_source(self.cache)


def find_data(data_path: Path | None, data_root: Path | None) -> Path | None:
    """The folder of images: the one named, or the known set below ``data_root``; None for none.

    Raises:
        FileNotFoundError: a folder was named and is not there.
    """
    if data_path is not None:
        if not data_path.is_dir():
            raise FileNotFoundError(f"--data-path {data_path}: no such folder")
        return data_path
    if data_root is None or not data_root.is_dir():
        return None
    return datasets.find(data_root, datasets.get(DATA_SET))


def open_images(
    folder: Path | None, output: Path, *, known: bool, settings: Recipe
) -> PreparedData:
    """Check and split the images; None draws scenes.

    Args:
        output: of the experiment; the split and decoded images are kept there.
        known: the folder is the known set, whose facts are compared.
        settings: of drawn scenes, and the size of decoded images.
    """
    output.mkdir(parents=True, exist_ok=True)
    if folder is None:
        scenes = {
            "num_classes": settings.classes,
            "image_size": SCENE_SIDE,
            "images_per_class": settings.images,
            "seed": 0,
        }
        fractions = (("train", 0.6), ("calibration", 0.2), ("test", 0.2))
        data = prepare_data(output, root=None, scenes=scenes, fractions=fractions)
    else:
        spec = datasets.get(DATA_SET) if known else None
        data = prepare_data(output, root=folder, spec=spec)
    for part in ("train", "calibration", "test"):
        if part not in data.manifest.splits:
            raise UsageError(f"{folder}: no {part} images, expected train, val and test folders")
    if not settings.cache_side:
        return data
    everything = data.manifest.entries
    whole = ImageSet(
        [data.root / entry.path for entry in everything],
        [entry.label for entry in everything],
        [entry.key for entry in everything],
    )
    cache = DecodedCache.open_or_build(whole, output / "cache", short_side=settings.cache_side)
    values = {one.name: getattr(data, one.name) for one in fields(data)}
    return CachedData(**values, cache=cache)
