"""Mixup and cutmix, given what to mix; the draw is :mod:`shared_core.datasets.views.mixing`."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Indices: TypeAlias = NDArray[np.int64] | Sequence[int] | Tensor


def _check(batch: int, lam: float, permutation: Indices, device: torch.device) -> Tensor:
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam is {lam}, expected 0 <= lam <= 1")
    index = torch.as_tensor(permutation, dtype=torch.int64, device=device)
    if index.shape != (batch,):
        raise ValueError(
            f"permutation has shape {tuple(index.shape)}, expected ({batch},) as the batch"
        )
    return index


def one_hot(labels: Tensor, *, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Soft targets ``(1 - s) * one_hot + s / C`` from class numbers.

    Args:
        labels: int64, shape ``(N,)``, values in ``[0, C)``.
        num_classes: ``C``.
        smoothing: ``0 <= s < 1``.

    Returns:
        float32, shape ``(N, C)``, rows sum to 1.

    Raises:
        ValueError: ``s`` out of range.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}, expected 0 <= smoothing < 1")
    hard = F.one_hot(labels, num_classes).to(torch.float32)
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
    index = _check(len(targets), lam, permutation, targets.device)
    return targets * lam + targets[index] * (1.0 - lam)


def mixup(images: Tensor, *, lam: float, permutation: Indices) -> Tensor:
    """``lam * images + (1 - lam) * images[permutation]``.

    Args:
        images: float, shape ``(N, C, H, W)``.
        lam: fraction in [0, 1]; 1 changes nothing.
        permutation: int, shape ``(N,)``.

    Raises:
        ValueError: ``lam`` out of range, or a permutation of another length.

    Source: Zhang et al. 2018, arXiv:1710.09412, section 2.
    """
    index = _check(len(images), lam, permutation, images.device)
    return images * lam + images[index] * (1.0 - lam)


def cutmix(images: Tensor, *, box: tuple[int, int, int, int], permutation: Indices) -> Tensor:
    """Each image with a rectangle of its partner pasted in at the same place.

    Args:
        images: float, shape ``(N, C, H, W)``.
        box: top, left, bottom, right in pixels, the last two exclusive; may be empty.
        permutation: int, shape ``(N,)``.

    Raises:
        ValueError: a box outside the image, or a permutation of another length.

    Source: Yun et al. 2019, arXiv:1905.04899, section 3.1.
    """
    index = _check(len(images), 1.0, permutation, images.device)
    height, width = images.shape[2:]
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(f"box is {box}, expected it inside {height} x {width} pixels")
    inside = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    inside[top:bottom, left:right] = True
    return torch.where(inside, images[index], images)
