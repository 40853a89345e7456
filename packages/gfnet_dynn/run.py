"""What every stage of a run needs: its settings, data, log and device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfnet_dynn.data_loader_helper import Data, Loaders
from gfnet_dynn.scene_views import TurnedLoader
from gfnet_dynn.settings import Settings
from gfnet_dynn.tracking import RunLog
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.distributed import World
from shared_core.for_torch.seeds import seed_all
from shared_core.runs import derive_seed, progress


@dataclass(frozen=True)
class Run:
    """One run, as all of its stages see it."""

    settings: Settings
    config: dict[str, Any]  # flat and plain, as model files and records keep it
    data: Data
    log: RunLog
    device: torch.device
    precision: str
    world: World

    def loaders(self, *, shared: bool = False) -> Loaders:
        """What makes batches: of all images, or ``shared`` out among the processes."""
        share = (self.world.rank, self.world.world_size) if shared else (0, 1)
        settings = self.settings
        workers = settings.source.num_workers
        return Loaders(self.data, settings.views, settings.seed, workers, self.device, *share)

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return self.log.folder

    def student_batches(
        self, stage: str, *, batch_size: int, answers: np.ndarray | None = None
    ) -> TorchLoader | TurnedLoader:
        """What a student and its exits learn from: whole images in turns where answers are stored,
        because the teacher was asked these very views; random crops where it is asked live."""
        loaders = self.loaders(shared=True)
        if self.settings.stored_answers:
            return loaders.turned(stage, batch_size=batch_size, answers=answers)
        if self.settings.networks.no_distil and self.settings.networks.teacher_network:
            return loaders.shifted(stage, batch_size=batch_size)
        return loaders.train(stage, batch_size=batch_size)

    def file(self, stage: str) -> Path:
        """The model file of ``backbone``, ``student`` or ``labels``."""
        return self.folder / "checkpoint" / f"{stage}_{self.data.file_name}.pth"

    def seed(self, stage: str) -> None:
        """Every stage draws from a stream of its own."""
        seed_all(derive_seed(self.settings.seed, stage) % 2**32)


def pairs(loader: TorchLoader | TurnedLoader, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """``(images, labels)`` of each batch, with progress."""
    for batch in progress(loader, total=len(loader), label=label):
        yield batch.images, batch.labels
