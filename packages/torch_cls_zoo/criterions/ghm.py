"""GHM-C: terms whose gradients are common count less, rare ones more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COUNTS = ("loss", "original")


class GHMWeight(nn.Module):
    """``G = 1 / (M * f_b)``: ``f_b`` is the share of the terms whose ``g = |p - t|`` is in bin b.

    ``M`` is the number of bins that are not empty. ``f_b`` is a moving average over the batches in
    which the bin was not empty, corrected for its start at 0 by ``1 - momentum^(times updated)``.

    Which terms are counted, and for how much, is ``counts``:

    ``loss``
        Each term for its part in the loss: with softmax, whose loss is ``-sum_c t_c log p_c``, term
        c for ``t_c``; with sigmoid every term for 1. The mean of G over the loss is then 1 at the
        first step and stays near it: the loss keeps its scale.
    ``original``
        Every term of every class for 1. With sigmoid that is the same. With softmax nearly all
        terms are of wrong classes, easy and without a part in the loss; next to them the few that
        have one look rare, and the loss grows by about half the number of classes.

    Average and updates are buffers, so they are saved with the criterion's ``state_dict``. They
    change in training mode only; in evaluation mode the weight of a term depends on nothing but its
    ``g``. A bin that was never met then has weight 1. Samples that do not count (a curriculum's
    weight of 0) are no part of the density. Several processes add up their counts, so all learn
    the same.

    The first version of this zoo did not correct the start (weights 4 times too large at the first
    step), lost the average with the process, and changed it while evaluating. It kept counts, not
    shares: with one batch size that is the same.

    Source: Li et al. 2019, arXiv:1811.05181, equations 5 to 8 and the unit-region approximation
    with its moving average.
    """

    def __init__(
        self, *, bins: int = 30, momentum: float = 0.75, softmax: bool = False, counts: str = "loss"
    ) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins is {bins}, expected 1 or more")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum is {momentum}, expected 0 <= momentum < 1")
        if counts not in COUNTS:
            raise ValueError(f"counts is {counts!r}, expected one of {', '.join(COUNTS)}")
        self.bins = bins
        self.momentum = momentum
        self.by_target = softmax and counts == "loss"
        self.average: Tensor
        self.updates: Tensor
        self.register_buffer("average", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(bins, dtype=torch.int64))

    def bin_of(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Bin of each term, int64 ``(N, K)`` in ``[0, bins)``; the last one includes ``g = 1``."""
        g = (probs.double() - targets.double()).abs()
        return (g * self.bins).long().clamp_(max=self.bins - 1)

    def forward(self, probs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Weights ``(N, K)``, positive; learns the density of the samples ``counted``, bool
        ``(N,)`` (None: all), in training mode."""
        which = self.bin_of(probs, targets)
        if self.training:
            counts = self._counts(which, targets, counted)
            met = counts > 0
            share = counts / counts.sum().clamp_min(1e-300)
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

    def _counts(self, which: Tensor, targets: Tensor, counted: Tensor | None) -> Tensor:
        """How much falls into each bin, over all processes: float64 ``(bins,)``."""
        mass = targets.double() if self.by_target else torch.ones_like(which, dtype=torch.float64)
        if counted is not None:
            mass = mass * counted[:, None]
        counts = self.average.new_zeros(self.bins)
        counts.index_add_(0, which.flatten(), mass.flatten())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        return counts
