"""What a network sees of an image, in batches: the whole of it, or crops with lighting noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from landmark_distill.config import LIGHTING_ORDERS
from shared_core.datasets import BatchLoader, EpochOrder, EvalView, ImageSet, TrainView
from shared_core.datasets.views.augment import view_rng
from shared_core.for_torch.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalizer,
    TorchBatch,
    to_device,
)

# Principal components of ImageNet's colours, RGB in [0, 1]: rows are channels.
# Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural
# Networks", section 4.1; the values are those of the public fb.resnet.torch recipe.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def lighting_shift(keys: list[str | int], view: int, *, std: float, seed: int) -> np.ndarray:
    """What lighting noise adds to each image's channels, RGB, images in [0, 1].

    ``shift = E (a * lambda)`` with ``a ~ N(0, std^2)`` drawn for each view of each image.

    Args:
        keys: what names the images.
        view: which of their views.
        std: deviation of the coefficients; the recipe has 0.1.
        seed: of all views.

    Returns:
        float32 ``(N, 3)``.
    """
    vectors, values = np.array(EIGENVECTORS), np.array(EIGENVALUES)
    draws = [view_rng(seed, f"lighting|{key}", view).normal(0.0, std, 3) for key in keys]
    return (np.stack(draws) * values @ vectors.T).astype(np.float32)


class ViewLoader:
    """Batches of views of an image set, normalised on the device, in the channel order wanted.

    Args:
        loader: whose batches these are.
        normalizer: of what the network is used to; its device is where batches go.
        lighting: deviation of the lighting noise, 0 for none.
        lighting_order: ``right`` adds to each channel what belongs to it; ``original`` adds the
            RGB vector to BGR channels as it stands, as the original did.
        bgr: hand out blue first. Mean and deviation stay with their channel.
        seed: of the lighting noise.
    """

    def __init__(
        self,
        loader: BatchLoader,
        normalizer: Normalizer,
        *,
        lighting: float = 0.0,
        lighting_order: str = "right",
        bgr: bool = False,
        seed: int = 0,
    ) -> None:
        if lighting_order not in LIGHTING_ORDERS:
            raise ValueError(
                f"lighting order {lighting_order!r}, expected one of {', '.join(LIGHTING_ORDERS)}"
            )
        self.loader, self.normalizer = loader, normalizer
        self.lighting, self.lighting_order, self.bgr = lighting, lighting_order, bgr
        self.seed = seed
        self._std = torch.tensor(normalizer.std)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[TorchBatch]:
        for batch in self.loader:
            moved = to_device(batch, self.normalizer)
            images = moved.images
            if self.lighting > 0:
                keys = [self.loader.image_set.keys[n] for n in batch.indices.tolist()]
                images = images + self._shift(keys, batch.view_id).to(images)
            if self.bgr:
                images = images.flip(1)
            yield moved._replace(images=images)

    def _shift(self, keys: list[str | int], view: int) -> Tensor:
        """The noise in normalised units of RGB images, ``(N, 3, 1, 1)``."""
        shift = lighting_shift(keys, view, std=self.lighting, seed=self.seed)
        if self.lighting_order == "original" and self.bgr:
            shift = shift[:, ::-1].copy()  # flipped once more with the image
        return (torch.from_numpy(shift) / self._std)[:, :, None, None]

    def state_dict(self) -> dict[str, object]:
        """Where the epoch stands."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on there."""
        self.loader.load_state_dict(state)


def whole_view(image_size: int, method: str) -> EvalView:
    """The whole image squeezed to the network's size, as the original's test does it."""
    return EvalView(image_size, resize_ratio=None, method=method)


def view_settings(
    image_size: int,
    *,
    augment: bool,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    seed: int = 0,
    method: str = "linear",
) -> TrainView | EvalView:
    """What training sees of an image: a random resized crop, or the whole image squeezed."""
    if not augment:
        return whole_view(image_size, method)
    return TrainView(
        image_size, scale=crop_scale, ratio=crop_ratio, hflip=hflip, seed=seed, method=method
    )


def train_loader(
    images: ImageSet,
    *,
    view: TrainView | EvalView,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    threads: int,
    views: int = 0,
    rank: int = 0,
    world_size: int = 1,
    lighting: float = 0.0,
    lighting_order: str = "right",
    bgr: bool = False,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> ViewLoader:
    """Shuffled batches of this process; the images' views are decided by seed, image and epoch.

    Args:
        batch_size: of this process.
        seed: of the order of the images; that of the views is the view's own.
        views: how many different views an image has; 0 is a new one each epoch.
    """
    order = EpochOrder(
        len(images),
        seed=seed,
        rank=rank,
        world_size=world_size,
        uneven="wrap" if world_size > 1 else "keep",
    )
    loader = BatchLoader(
        images,
        view=view,
        batch_size=batch_size,
        order=order,
        threads=threads,
        drop_last=len(order) > batch_size and len(order) % batch_size == 1,  # batch norm needs two
        view_of_epoch=(lambda epoch: epoch % views) if views else None,
    )
    return ViewLoader(
        loader,
        Normalizer(mean, std, device=device),
        lighting=lighting if isinstance(view, TrainView) else 0.0,
        lighting_order=lighting_order,
        bgr=bgr,
        seed=view.seed,
    )


def eval_loader(
    images: ImageSet,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
    threads: int,
    bgr: bool = False,
    method: str = "linear",
    order: EpochOrder | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> ViewLoader:
    """Every image once, in order, squeezed; ``order`` shares them out among processes."""
    view = whole_view(image_size, method)
    loader = BatchLoader(images, view=view, batch_size=batch_size, order=order, threads=threads)
    return ViewLoader(loader, Normalizer(mean, std, device=device), bgr=bgr)
