"""What training and evaluation see of an image; inference sees what evaluation does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared_core.datasets import EvalView, SmallView, TrainView
from shared_core.datasets.reading.decode import EncodedImage, read_bytes
from shared_core.datasets.reading.loader import write_view
from shared_core.datasets.views.view_random import view_rng

SMALL = 64  # images up to this side are kept whole in memory and augmented a batch at a time
LARGE_RATIO = 256 / 224  # the short side that is resized to, over what is cut out


def is_small(image_size: int) -> bool:
    """Whether images of this side take the path of small images."""
    return image_size <= SMALL


def short_side(image_size: int) -> int:
    """The short side that large images are cached at, pixels."""
    return round(image_size * LARGE_RATIO)


def train_view(
    image_size: int, *, augment: bool, mirror: bool, seed: int, crop: float = 0.08
) -> SmallView | TrainView:
    """Crop and flip, replayable by seed, image and view number.

    Args:
        augment: False cuts the centre and never mirrors.
        mirror: whether a mirrored image is still one of its class (digits are not).
        crop: smallest share of a large image that a view shows, in (0, 1].
    """
    flip = 0.5 if augment and mirror else 0.0
    if is_small(image_size):
        pad = image_size // 8 if augment else 0
        return SmallView(image_size, pad=pad, hflip=flip, seed=seed)
    if not augment:
        # A crop of everything: the same pixels for every view.
        return TrainView(image_size, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, seed=seed)
    return TrainView(image_size, scale=(crop, 1.0), hflip=flip, seed=seed)


def small_eval_view(image_size: int) -> SmallView:
    """Images in an array as they are."""
    return SmallView(image_size, pad=0, hflip=0.0)


def eval_view(image_size: int, *, whole: bool = False) -> EvalView:
    """From a whole image of any size to what the network sees.

    Small: the image squeezed to the side (by area). Large: the short side to 8/7 of it, the centre
    cut out. Both shrink by area, so that a cache of shrunk images gives the same pixels. ``whole``:
    an image that is smaller is enlarged as it is.
    """
    if whole:
        return EvalView(image_size, resize_ratio=None, method="cubic")
    if is_small(image_size):
        return EvalView(image_size, resize_ratio=None, method="area")
    return EvalView(image_size, resize_ratio=LARGE_RATIO, method="area")


def open_image(source: str | bytes, *, image_size: int, name: str = "") -> npt.NDArray[np.uint8]:
    """An image file (a path, or its bytes) as evaluation sees it, uint8 ``(S, S, 3)`` RGB.

    Raises:
        FileNotFoundError, DecodeError: no such file, or no image.
    """
    data = read_bytes(source) if isinstance(source, str) else source
    encoded = EncodedImage(data, name=name or (source if isinstance(source, str) else "image"))
    out = np.empty((image_size, image_size, 3), np.uint8)
    write_view(encoded, eval_view(image_size), view_rng(0, 0, 0), out)
    return out
