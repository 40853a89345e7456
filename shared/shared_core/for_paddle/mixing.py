"""Mixup and cutmix of :mod:`shared_core.for_torch.mixing` in Paddle: same names, same numbers.

What to mix is drawn by :mod:`shared_core.datasets.views.mixing`.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.nn import functional as F  # noqa: N812

Indices: TypeAlias = NDArray[np.int64] | Sequence[int] | Tensor


def _check(batch: int, lam: float, permutation: Indices) -> Tensor:
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam is {lam}, expected 0 <= lam <= 1")
    index = paddle.to_tensor(permutation, dtype="int64")
    if list(index.shape) != [batch]:
        raise ValueError(
            f"permutation has shape {tuple(index.shape)}, expected ({batch},) as the batch"
        )
    return index


def one_hot(labels: Tensor, *, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Soft targets ``(1 - s) * one_hot + s / C``, float32, shape ``(N, C)``.

    Args:
        labels: int64, shape ``(N,)``, values in ``[0, C)``.
        num_classes: ``C``.
        smoothing: ``0 <= s < 1``.

    Raises:
        ValueError: ``s`` out of range.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}, expected 0 <= smoothing < 1")
    hard = F.one_hot(labels, num_classes).astype("float32")
    return hard * (1.0 - smoothing) + smoothing / num_classes


def mix_targets(targets: Tensor, *, lam: float, permutation: Indices) -> Tensor:
    """``lam * targets + (1 - lam) * targets[permutation]``.

    Args:
        targets: float, shape ``(N, C)``.
        lam: fraction in [0, 1].
        permutation: int, shape ``(N,)``.

    Raises:
        ValueError: ``lam`` out of range, or a permutation of another length.
    """
    index = _check(len(targets), lam, permutation)
    return targets * lam + paddle.index_select(targets, index) * (1.0 - lam)


def mixup(images: Tensor, *, lam: float, permutation: Indices) -> Tensor:
    """``lam * images + (1 - lam) * images[permutation]``.

    Args:
        images: float, shape ``(N, C, H, W)``.
        lam: fraction in [0, 1]; 1 changes nothing.
        permutation: int, shape ``(N,)``.

    Raises:
        ValueError: ``lam`` out of range, or a permutation of another length.
    """
    index = _check(len(images), lam, permutation)
    return images * lam + paddle.index_select(images, index) * (1.0 - lam)


def cutmix(images: Tensor, *, box: tuple[int, int, int, int], permutation: Indices) -> Tensor:
    """Each image with a rectangle of its partner pasted in at the same place.

    Args:
        images: float, shape ``(N, C, H, W)``.
        box: top, left, bottom, right in pixels, the last two exclusive; may be empty.
        permutation: int, shape ``(N,)``.

    Raises:
        ValueError: a box outside the image, or a permutation of another length.
    """
    index = _check(len(images), 1.0, permutation)
    height, width = images.shape[2:]
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(f"box is {box}, expected it inside {height} x {width} pixels")
    mask = np.zeros((1, 1, height, width), dtype=bool)
    mask[:, :, top:bottom, left:right] = True
    return paddle.where(paddle.to_tensor(mask), paddle.index_select(images, index), images)
