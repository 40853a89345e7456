"""Online hard mining: only the hardest share of a batch counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OHMWeight(nn.Module):
    """1 for the ``ceil(hard_ratio * n)`` hardest, 0 for the rest; hardness is ``|p - t|``.

    By sample (softmax): hardness is the largest over the classes, ``n = N``. By term (sigmoid):
    every term by itself, ``n = N * K``. Equal hardness: the earlier one is kept.

    Only what counts at all is ranked, and ``n`` is its number: a sample that a curriculum takes out
    takes no place of the hardest. In evaluation mode everything is kept.

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

    def forward(self, probs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Weights ``(N, K)``, 0 or 1; ``counted`` says which samples are ranked, bool ``(N,)``."""
        if not self.training:
            return torch.ones_like(probs)
        hardness = (probs - targets).abs()
        if self.by_sample:
            hardness = hardness.amax(dim=1, keepdim=True)
        if counted is not None:  # the others come last
            hardness = hardness.masked_fill(~counted[:, None], -1.0)
        flat = hardness.flatten()
        number = (flat >= 0).sum()
        # A hair less, so that 0.7 of 10 is 7 and not 8 by a rounding error.
        count = (self.hard_ratio * number.double() - 1e-9).ceil().clamp_min(1)
        order = torch.sort(flat, descending=True, stable=True).indices
        places = torch.arange(len(flat), device=flat.device)
        kept = torch.zeros_like(flat).index_copy_(0, order, (places < count).to(flat.dtype))
        return kept.reshape(hardness.shape).expand_as(probs)
