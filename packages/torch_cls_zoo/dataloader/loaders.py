"""Batches: shuffled and augmented for training, each image once for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared_core.datasets import BatchLoader, EpochOrder, ImageSet
from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD, Normalizer, TorchLoader
from shared_core.for_torch.distributed import World
from shared_core.runs import derive_seed
from torch_cls_zoo.dataloader.balance import BalancedOrder
from torch_cls_zoo.dataloader.enhancement.policies import make_augment
from torch_cls_zoo.dataloader.view import CropView


@dataclass(frozen=True)
class InputSettings:
    """How images become the network's input."""

    size: tuple[int, int]  # height, width, pixels
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the RGB channels, fractions of 255
    std: tuple[float, ...] = IMAGENET_STD

    def normalizer(self, device: torch.device | str) -> Normalizer:
        """Bytes to numbers on a device."""
        return Normalizer(tuple(self.mean), tuple(self.std), device=device)


def train_loader(
    images: ImageSet,
    settings: InputSettings,
    *,
    batch_size: int,
    policy: str | None,
    crop: float = 1.0,
    flip: float = 0.0,
    quarter_turns: bool = False,
    erasing: float = 0.0,
    balanced: bool = False,
    seed: int,
    world: World,
    threads: int,
) -> TorchLoader:
    """Shuffled batches of this process; a view is decided by seed, image and epoch alone.

    All processes get as many batches of the same sizes (a few images come twice when the number
    does not divide). A last batch of one image is left out: batch norm cannot learn from it.

    Args:
        images: all training images.
        batch_size: of each process.
        policy: name of the augmentation, or None.
        crop: least share of the letterboxed picture that a random window keeps; 1 shows all of it.
        flip: probability of a mirrored picture.
        quarter_turns: turn pictures by right angles.
        erasing: probability of a covered rectangle.
        balanced: show every class as often, see :class:`BalancedOrder`.
        seed: of the order and of the views.
        threads: that decode.
    """
    sharing: dict[str, Any] = {
        "seed": derive_seed(seed, "order"),
        "rank": world.rank,
        "world_size": world.world_size,
        "uneven": "wrap" if world.world_size > 1 else "keep",
    }
    order = EpochOrder(len(images), **sharing)
    if balanced:
        order = BalancedOrder(images.labels, **sharing)
    mine, augment = len(order), make_augment(policy)
    view: LetterboxView | CropView = LetterboxView(settings.size)
    if crop < 1 or flip > 0 or quarter_turns or erasing > 0 or augment is not None:
        view = CropView(
            settings.size,
            least=crop,
            flip=flip,
            quarter_turns=quarter_turns,
            erasing=erasing,
            augment=augment,
            seed=derive_seed(seed, "views"),
        )
    loader = BatchLoader(
        images,
        view=view,
        batch_size=batch_size,
        order=order,
        threads=threads,
        drop_last=mine > batch_size and mine % batch_size == 1,
        # A batch that is missing in one process would leave the others waiting.
        on_error="raise" if world.world_size > 1 else "skip",
    )
    return TorchLoader(loader, settings.normalizer(world.device))


def eval_loader(
    images: ImageSet, settings: InputSettings, *, batch_size: int, world: World, threads: int
) -> TorchLoader:
    """This process' share of the images, each once; unreadable ones are in ``loader.skipped``."""
    order = EpochOrder(
        len(images), shuffle=False, rank=world.rank, world_size=world.world_size, uneven="keep"
    )
    loader = BatchLoader(
        images,
        view=LetterboxView(settings.size),
        batch_size=batch_size,
        order=order,
        threads=threads,
        on_error="skip",
    )
    return TorchLoader(loader, settings.normalizer(world.device))
