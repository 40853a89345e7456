"""Draw what mixup and cutmix need: one weight, one permutation, one box a batch.

The draw is NumPy's, so that torch and Paddle mix the same batches from the same seed.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # top, left, bottom, right, in pixels; bottom and right exclusive


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed: image ``i`` with image ``permutation[i]``."""

    lam: float  # weight of the image itself, fraction in [0, 1]
    permutation: NDArray[np.int64]  # shape (N,)
    box: Box | None = None  # the pasted rectangle; None means mixup


def draw_mixup(rng: np.random.Generator, batch_size: int, *, alpha: float) -> Mix:
    """A weight from ``Beta(alpha, alpha)`` and a permutation of the batch.

    Args:
        rng: advanced by a Beta draw and a permutation.
        batch_size: images, at least 1.
        alpha: above 0; small values mix little.

    Raises:
        ValueError: ``alpha`` or ``batch_size`` out of range.

    Source: Zhang et al. 2018, arXiv:1710.09412, section 2.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, expected more than 0")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    lam = float(rng.beta(alpha, alpha))
    return Mix(lam, rng.permutation(batch_size).astype(np.int64))


def draw_cutmix(
    rng: np.random.Generator, batch_size: int, *, alpha: float, height: int, width: int
) -> Mix:
    """Like :func:`draw_mixup`, with a box that covers ``1 - lam`` of the image.

    The box has the image's shape and a uniform centre; where it is cut off at the border, ``lam``
    becomes the fraction that is really kept.

    Args:
        rng: advanced by a Beta draw, a permutation and two integers.
        batch_size: images, at least 1.
        alpha: above 0.
        height: of the images, pixels.
        width: of the images, pixels.

    Raises:
        ValueError: an argument out of range.

    Source: Yun et al. 2019, arXiv:1905.04899, section 3.1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image is {height} x {width} pixels, expected at least 1 x 1")
    mix = draw_mixup(rng, batch_size, alpha=alpha)
    side = sqrt(1.0 - mix.lam)
    cut_h, cut_w = int(height * side), int(width * side)
    centre_y, centre_x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(centre_y - cut_h // 2, 0), min(centre_y - cut_h // 2 + cut_h, height)
    left, right = max(centre_x - cut_w // 2, 0), min(centre_x - cut_w // 2 + cut_w, width)
    kept = 1.0 - (bottom - top) * (right - left) / (height * width)
    return Mix(kept, mix.permutation, (top, left, bottom, right))
