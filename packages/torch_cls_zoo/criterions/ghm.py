"""GHM-C: terms whose gradients are common count less, rare ones more."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GHMWeight(nn.Module):
    """``G = 1 / (M * f_b)``: ``f_b`` is the share of all terms whose ``g = |p - t|`` is in bin b.

    ``M`` is the number of bins that are not empty, so the mean weight of a batch is 1 at the first
    step and stays near it. ``f_b`` is a moving average over the batches in which the bin was not
    empty, corrected for its start at 0 by ``1 - momentum^(times updated)``.

    Both are buffers, so they are saved with the criterion's ``state_dict``. They change in training
    mode only; in evaluation mode the weight of a term depends on nothing but its ``g``. A bin that
    was never met then has weight 1. Several processes add up their counts, so all learn the same.

    The first version of this zoo did not correct the start (weights 4 times too large at the first
    step), lost the average with the process, and changed it while evaluating. It kept counts, not
    shares: with one batch size that is the same.

    Source: Li et al. 2019, arXiv:1811.05181, equations 5 to 8 and the unit-region approximation
    with its moving average.
    """

    def __init__(self, *, bins: int = 30, momentum: float = 0.75) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins is {bins}, expected 1 or more")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum is {momentum}, expected 0 <= momentum < 1")
        self.bins = bins
        self.momentum = momentum
        self.average: Tensor
        self.updates: Tensor
        self.register_buffer("average", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(bins, dtype=torch.int64))

    def bin_of(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Bin of each term, int64 ``(N, K)`` in ``[0, bins)``; the last one includes ``g = 1``."""
        g = (probs.double() - targets.double()).abs()
        return (g * self.bins).long().clamp_(max=self.bins - 1)

    def forward(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Weights ``(N, K)``, positive; learns the density in training mode."""
        which = self.bin_of(probs, targets)
        if self.training:
            counts = torch.bincount(which.flatten(), minlength=self.bins).double()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            met = counts > 0
            share = counts / counts.sum()
            moved = self.momentum * self.average + (1.0 - self.momentum) * share
            self.average.copy_(torch.where(met, moved, self.average))
            self.updates += met.long()
        else:
            met = self.updates > 0
        correction = 1.0 - self.momentum ** self.updates.double()
        density = self.average / correction.clamp_min(1e-300)
        known = met & (self.updates > 0)
        weight = 1.0 / (density * met.sum()).clamp_min(1e-300)
        weight = torch.where(known, weight, torch.ones_like(weight))
        return weight[which].to(probs.dtype)
