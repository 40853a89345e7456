"""Online hard mining: only the hardest share of a batch counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class OHMWeight(nn.Module):
    """1 for the ``ceil(hard_ratio * n)`` hardest, 0 for the rest; hardness is ``|p - t|``.

    By sample (softmax): hardness is the largest over the classes, ``n = N``. By term (sigmoid):
    every term by itself, ``n = N * K``. Equal hardness: the earlier one is kept.

    In evaluation mode everything is kept.

    The first version of this zoo kept the *easiest* samples with softmax, and the hardest
    ``1 - hard_ratio`` with sigmoid; here the ratio is the share of hard ones in both.

    Source: Shrivastava et al. 2016, arXiv:1604.03540, for samples instead of regions.
    """

    def __init__(self, hard_ratio: float = 0.7, *, by_sample: bool) -> None:
        super().__init__()
        if not 0.0 < hard_ratio <= 1.0:
            raise ValueError(f"hard_ratio is {hard_ratio}, expected 0 < hard_ratio <= 1")
        self.hard_ratio = hard_ratio
        self.by_sample = by_sample

    def forward(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Weights ``(N, K)``, 0 or 1."""
        if not self.training:
            return torch.ones_like(probs)
        hardness = (probs - targets).abs()
        if self.by_sample:
            hardness = hardness.amax(dim=1)
        flat = hardness.flatten()
        # A hair less, so that 0.7 of 10 is 7 and not 8 by a rounding error.
        count = max(1, math.ceil(self.hard_ratio * flat.numel() - 1e-9))
        chosen = torch.sort(flat, descending=True, stable=True).indices[:count]
        kept = torch.zeros_like(flat).index_fill_(0, chosen, 1.0).reshape(hardness.shape)
        return kept[:, None].expand_as(probs) if self.by_sample else kept
