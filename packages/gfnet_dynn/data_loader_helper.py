"""From a folder of images, or built-in scenes, to three splits and their loaders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfnet_dynn.scene_views import ALL_TURNS, MIRRORED, ShiftedView, TurnedLoader
from gfnet_dynn.settings import Source, Views
from shared_core import datasets
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.datasets.splitting.prepared import prepare_data as prepare_splits
from shared_core.datasets.views.augment import View
from shared_core.for_torch.data import Normalizer, TorchLoader
from shared_core.runs import derive_seed

METHOD = {"bicubic": "cubic", "bilinear": "linear"}


@dataclass(frozen=True)
class Data(PreparedData):
    """A data set that is ready to train on, and the side of the network's input in pixels."""

    input_size: int = 0

    @property
    def file_name(self) -> str:
        """The data set as file names spell it."""
        return self.name.replace(" ", "-")

    def facts(self, pixels: int | None = None) -> dict[str, Any]:
        """What a record says of the data."""
        return super().facts(pixels or self.input_size)


def prepare_data(source: Source, output: Path, *, seed: int) -> Data:
    """Find or make the images, look at every file once, split them, and write it all down.

    Args:
        output: the run's folder.
        seed: of built-in scenes.

    Raises:
        DatasetError, FileNotFoundError: no images, too few, or other classes than expected.
    """
    real = source.data_path is not None
    spec = datasets.get(source.data_set) if real and source.known else None
    rest = (1.0 - source.split_ratio) / 2
    found = prepare_splits(
        output,
        root=source.data_path,
        name=source.data_set if real else None,
        spec=spec,
        num_classes=source.num_classes,
        fractions=(("train", source.split_ratio), ("calibration", rest), ("test", rest)),
        split_seed=source.split_seed,
        split=source.split,
        quarantine=source.quarantine,
        group_by=source.group_by or "near",
        drop_leaks=bool(source.drop_leaks),
        workers=source.num_workers,
        scenes={
            "num_classes": source.builtin_classes,
            "image_size": source.input_size or 64,
            "images_per_class": source.builtin_images,
            "seed": derive_seed(seed, "scenes") % 2**31,
        },
    )
    size = source.input_size
    if not size:
        own = found.image_side()
        size = min(own, spec.image_size or own) if spec else own
    return Data(**vars(found), input_size=int(size))


@dataclass(frozen=True)
class Loaders:
    """Makes the batches of a run.

    Attributes:
        workers: threads that read and decode.
        rank, world_size: which share of the images this process gets.
    """

    data: Data
    views: Views
    seed: int
    workers: int
    device: torch.device
    rank: int = 0
    world_size: int = 1

    def train(self, stage: str, *, batch_size: int) -> TorchLoader:
        """Shuffled, augmented training batches; seed, stage, image and epoch decide a view.

        With several processes each gets its share of every batch: ``batch_size`` is that of one.

        Raises:
            DatasetError: too few images for one batch.
        """
        return self._shuffled(self._train_view(stage), stage, batch_size)

    def shifted(self, stage: str, *, batch_size: int) -> TorchLoader:
        """The same of whole images, shifted and turned: for fine-tuning a trained network."""
        seed = derive_seed(self.seed, stage, "views")
        view = ShiftedView(self.data.input_size, turns=self.turns, seed=seed, **self._resizing)
        return self._shuffled(view, stage, batch_size)

    def turned(
        self, stage: str, *, batch_size: int, answers: np.ndarray | None = None
    ) -> TurnedLoader:
        """The same of whole images in all their turns, with a teacher's answers to them."""
        view = datasets.EvalView(self.data.input_size, **self._resizing)
        batches = self._shuffled(view, stage, batch_size)
        seed = derive_seed(self.seed, stage, "turns")
        return TurnedLoader(batches, turns=self.turns, seed=seed, answers=answers)

    @property
    def turns(self) -> tuple[int, ...]:
        """The turns that are as likely as the image itself; all where upside down may be."""
        return ALL_TURNS if self.views.vflip else MIRRORED

    @property
    def _resizing(self) -> dict[str, Any]:
        method = METHOD[self.views.train_interpolation]
        return {"resize_ratio": 1.0 / self.views.crop_pct, "method": method}

    def _shuffled(self, view: View, stage: str, batch_size: int) -> TorchLoader:
        images = self.data.image_set("train")
        if len(images) < batch_size * self.world_size:
            raise datasets.DatasetError(
                f"{len(images)} training images make no batch of {batch_size * self.world_size}: "
                "expected at least one"
            )
        order = datasets.EpochOrder(
            len(images),
            seed=derive_seed(self.seed, stage, "order"),
            rank=self.rank,
            world_size=self.world_size,
            uneven="keep" if self.world_size == 1 else "drop",
        )
        loader = datasets.BatchLoader(
            images,
            view=view,
            batch_size=batch_size,
            order=order,
            threads=self.workers,
            drop_last=True,
        )
        return TorchLoader(loader, Normalizer(device=self.device))

    def _train_view(self, stage: str) -> datasets.TrainView:
        views = self.views
        return datasets.TrainView(
            self.data.input_size,
            scale=views.crop_scale,
            hflip=0.5,
            vflip=0.5 if views.vflip else 0.0,
            randaugment=None if views.aa == "none" else views.aa,
            color_jitter=views.color_jitter if views.color_jitter and views.aa == "none" else None,
            erasing=views.reprob,
            erasing_mode=views.remode,
            erasing_count=views.recount,
            seed=derive_seed(self.seed, stage, "views"),
            method=METHOD[views.train_interpolation],
        )

    def held(self, split: str, *, rows: np.ndarray | None = None) -> TorchLoader:
        """Every image of a split once, in order, resized and cut as ``--crop-pct`` says.

        Of several processes number r gets images r, r + ``world_size``, ...

        Args:
            rows: only these images of the split, int ``(M,)``.

        Raises:
            DatasetError: fewer images than processes.
        """
        images = self.data.image_set(split)
        if rows is not None:
            assert images.paths is not None
            images = ImageSet(
                [images.paths[row] for row in rows],
                images.labels[rows],
                [images.keys[row] for row in rows],
            )
        if len(images) < self.world_size:
            raise datasets.DatasetError(
                f"{len(images)} images of the {split} split for {self.world_size} processes: "
                "expected one for each at least"
            )
        view = datasets.EvalView(self.data.input_size, **self._resizing)
        order = datasets.EpochOrder(
            len(images), shuffle=False, rank=self.rank, world_size=self.world_size
        )
        loader = datasets.BatchLoader(
            images, view=view, batch_size=128, order=order, threads=self.workers
        )
        return TorchLoader(loader, Normalizer(device=self.device))
