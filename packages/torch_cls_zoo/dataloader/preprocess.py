"""One image as the network sees it: letterboxed, RGB, scaled; the same in training and use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_core.datasets import letterbox
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD

FILL = 0  # grey level of the padding
METHOD = "reduced"  # see shared_core.datasets.views.geometry: block means, then bilinear
Triple = tuple[float, float, float]


def preprocess(
    image: np.ndarray, size: tuple[int, int], *, out: np.ndarray | None = None
) -> np.ndarray:
    """Fit the whole image into ``size`` without distortion, centred on black.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        size: height and width of the result in pixels; exact for any, odd ones too.
        out: where to write; a new array by default.

    Returns:
        uint8 ``(height, width, 3)``.

    Raises:
        ValueError: an empty image or a size below 1.
    """
    return letterbox(image, size, FILL, method=METHOD, out=out)


def normalization(advprop: bool = False) -> tuple[Triple, Triple]:
    """Mean and deviation of the RGB channels, as fractions of 255.

    ImageNet's; with ``advprop`` 0.5 and 0.5, which is ``2 x - 1`` as nets trained with adversarial
    propagation want it.
    """
    if advprop:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return IMAGENET_MEAN, IMAGENET_STD


def prepare_batch(
    images: Sequence[np.ndarray],
    size: tuple[int, int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Images of any sizes as the network's input, without torch.

    Args:
        images: uint8 RGB ``(H, W, 3)`` each, at least one.
        size: height and width in pixels.
        mean, std: of the channels, fractions of 255.

    Returns:
        float32 ``(N, 3, height, width)``.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("no images, expected at least one")
    batch = np.stack([preprocess(image, size) for image in images]).astype(np.float32)
    spread = np.asarray(std, np.float64)
    scale = (1 / (255 * spread)).astype(np.float32)
    shift = (-np.asarray(mean, np.float64) / spread).astype(np.float32)
    return np.ascontiguousarray((batch * scale + shift).transpose(0, 3, 1, 2))
