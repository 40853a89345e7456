"""One pass over the class weights, some rows at a time: sums of exponentials and weighted rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_distill.head.cosine_head import CosineMarginHead

CHUNK = 1024  # class weights at a time; N x CHUNK scores are all that is ever there of N x C
GPU_CHUNK = 16_384  # larger products keep a GPU busy


@dataclass(frozen=True)
class Softmax:
    """One softmax over the same scores: ``softmax((scale * cos - shrink * [c = label]) / T)``.

    Args:
        temperature: ``T > 0``.
        shrink: what the label's score loses, ``scale * margin``; 0 for no margin.
    """

    temperature: float = 1.0
    shrink: float = 0.0


@dataclass
class Sums:
    """What one view leaves: enough for the loss and its gradient.

    Args:
        log_sum: log-sum-exp, ``(N,)`` float64, nats.
        mean: softmax-mean of the unit class weights, ``(N, D)``, or None when not asked for.
        log_label: logarithm of the label's probability, ``(N,)`` float64, or None without labels.
    """

    log_sum: Tensor
    mean: Tensor | None
    log_label: Tensor | None


def compute_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if any input is, bfloat16 by the weight or autocast, else float32: of the products.

    float16 has not the range for sums of exponentials; such weights are widened chunk by chunk.
    """
    if torch.float64 in (features.dtype, weight.dtype):
        return torch.float64
    kind = features.device.type
    amp = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if amp or weight.dtype == torch.bfloat16 else torch.float32


def class_rows(head: CosineMarginHead, labels: Tensor, like: Tensor) -> Tensor:
    """Unit class weights of the labels, ``(N, D)``, with device and dtype of ``like``."""
    rows = head.weight.detach()[labels.to(head.weight.device)].to(like)
    scale = head.row_scale()
    return rows if scale is None else rows * scale[labels.to(scale.device)].to(like)[:, None]


def stream(
    unit: Tensor,
    head: CosineMarginHead,
    views: Sequence[Softmax],
    *,
    labels: Tensor | None = None,
    means: bool = True,
    best: bool = False,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Sums], Tensor | None]:
    """All views in one pass over the head.

    The margin is applied to the label's score inside its chunk. Taking it off the finished sum
    instead, ``Z - e^z + e^(z - s m)``, cancels when the label has nearly all of the probability.

    The cosine bounds the scores, so the exponentials need no shift while ``scale * (1 + margin) /
    T`` is small; beyond, a running maximum keeps them in range (as in online softmax).

    Args:
        unit: features of length 1, ``(N, D)``, float32 or float64.
        head: ``C`` rows, on any device; chunks are brought to the features.
        views: the softmaxes that are wanted.
        labels: int64 ``(N,)``; needed when a view has ``shrink``.
        means: also sum the weighted rows, which is most of the work.
        best: also say whether the label has the largest score (without margin).
        chunk: rows at a time; None for what suits the device.
        dtype: of the products; sums are kept in float32 (float64 for float64).

    Returns:
        One :class:`Sums` a view, and bool ``(N,)`` or None.

    Source: Rabe and Staats 2021, arXiv:2112.05682, section 2 (lazy softmax, running maximum).
    """
    work = _Pass(unit, head, views, labels, means=means, best=best, chunk=chunk, dtype=dtype)
    weight = head.weight.detach()
    for first in range(0, head.num_classes, work.chunk):
        rows = weight[first : first + work.chunk]  # (c, D)
        work.add(first, rows.to(device=unit.device, dtype=dtype))
    right = work.label_score >= work.top if best and labels is not None else None
    return work.sums(), right


class _Pass:
    """What a pass keeps while it goes over the rows, and its buffers, which are made once.

    A score is a product of feature and row; a power is the exponential of a score at a view's
    temperature, with the label's margin taken off.
    """

    def __init__(
        self,
        unit: Tensor,
        head: CosineMarginHead,
        views: Sequence[Softmax],
        labels: Tensor | None,
        *,
        means: bool,
        best: bool,
        chunk: int | None,
        dtype: torch.dtype,
    ) -> None:
        n, width = unit.shape
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtype, self.n, self.views, self.labels = dtype, n, views, labels
        self.row_scale, self.best, count = head.row_scale(), best, len(views)
        chunk = chunk or (CHUNK if unit.device.type == "cpu" else GPU_CHUNK)
        self.chunk = chunk = min(chunk, head.num_classes)
        self.scaled = (unit * head.scale).to(dtype)
        limit = 300.0 if self.wide == torch.float64 else 40.0
        self.shifted = any((head.scale + v.shrink) / v.temperature > limit for v in views)
        self.scores = unit.new_empty(n * chunk, dtype=self.wide)
        self.powers = unit.new_empty(count * n * chunk, dtype=self.wide)
        same = dtype == self.wide
        self.product = self.scores if same else unit.new_empty(n * chunk, dtype=dtype)
        self.narrow = self.powers if same else unit.new_empty(count * n * chunk, dtype=dtype)
        self.total = unit.new_zeros(count, n, dtype=torch.float64)
        start = -math.inf if self.shifted else 0.0
        self.peak = unit.new_full((count, n), start, dtype=self.wide)
        self.mean = unit.new_zeros(count * n, width, dtype=self.wide) if means else None
        self.label_score = unit.new_zeros(n, dtype=self.wide)
        self.top = unit.new_full((n,), -math.inf, dtype=self.wide)
        if labels is not None:  # in full precision, whatever the products have
            own = (unit * class_rows(head, labels, unit)).sum(1)
            self.label_score = own.mul(head.scale).to(self.wide)

    def add(self, first: int, rows: Tensor) -> None:
        """Take ``rows`` ``(c, D)`` of the head, the first of which is row ``first``."""
        n, size = self.n, len(rows)
        z = self.scores[: n * size].view(n, size)
        torch.mm(self.scaled, rows.T, out=self.product[: n * size].view(n, size))
        if self.dtype != self.wide:
            z.copy_(self.product[: n * size].view(n, size))
        part = None
        if self.row_scale is not None:
            part = self.row_scale[first : first + size].to(device=z.device, dtype=self.wide)
            z.mul_(part)
        here = place = None
        if self.labels is not None:
            place = (self.labels - first).clamp(0, size - 1)[:, None]
            here = (self.labels >= first) & (self.labels < first + size)
            own = torch.where(here, self.label_score, z.gather(1, place)[:, 0])
            z.scatter_(1, place, own[:, None])
        if self.best:
            self.top = torch.maximum(self.top, z.amax(1))
        powers = self.powers[: len(self.views) * n * size].view(len(self.views), n, size)
        for number in range(len(self.views)):
            self._add_powers(number, z, powers[number], place, here)
        if self.mean is not None:
            self._add_means(powers, rows, part)

    def _add_powers(
        self, number: int, z: Tensor, power: Tensor, place: Tensor | None, here: Tensor | None
    ) -> None:
        """One view's exponentials of the scores ``z``, into ``power`` and into its sum."""
        view = self.views[number]
        if view.temperature == 1 and not self.shifted and not view.shrink:
            torch.exp(z, out=power)
        else:
            torch.mul(z, 1 / view.temperature, out=power)
            if view.shrink and here is not None and place is not None:
                less = here.to(self.wide) * (-view.shrink / view.temperature)
                power.scatter_add_(1, place, less[:, None])
            if self.shifted:
                new = torch.maximum(self.peak[number], power.amax(1))
                fade = (self.peak[number] - new).exp()
                self.total[number] *= fade
                if self.mean is not None:
                    self.mean[number * self.n : (number + 1) * self.n] *= fade[:, None]
                self.peak[number] = new
                power.sub_(new[:, None])
            power.exp_()
        self.total[number] += power.sum(1)

    def _add_means(self, powers: Tensor, rows: Tensor, part: Tensor | None) -> None:
        """The rows, weighted by all views' powers; ``part`` is one over the rows' lengths."""
        if self.mean is None:
            return
        if part is not None:
            powers.mul_(part)
        flat = powers.view(len(self.mean), len(rows))
        if self.dtype == self.wide:
            self.mean.addmm_(flat, rows)
        else:
            cast = self.narrow[: flat.numel()].view(flat.shape).copy_(flat)
            self.mean += cast @ rows

    def sums(self) -> list[Sums]:
        """What the views leave when all rows were added."""
        found = []
        for number, view in enumerate(self.views):
            log_sum = self.total[number].log() + self.peak[number].double()
            log_label = rows = None
            if self.labels is not None:  # by the number that is in the sum, so it is never above 0
                own = self.label_score.double() - view.shrink
                log_label = own / view.temperature - log_sum
            if self.mean is not None:
                rows = self.mean[number * self.n : (number + 1) * self.n]
                rows.div_(self.total[number].to(self.wide)[:, None])
            found.append(Sums(log_sum, rows, log_label))
        return found
