"""One pass over the class weights, some rows at a time: sums of exponentials and weighted rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_distill.cosine_head import CosineMarginHead

CHUNK = 1024  # class weights at a time; N x CHUNK scores are all that is ever there of N x C
GPU_CHUNK = 16_384  # larger products keep a GPU busy


@dataclass(frozen=True)
class View:
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
    views: Sequence[View],
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
    n, width = unit.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, row_scale, count = head.weight.detach(), head.row_scale(), len(views)
    chunk = chunk or (CHUNK if unit.device.type == "cpu" else GPU_CHUNK)
    chunk = min(chunk, head.num_classes)
    scaled = (unit * head.scale).to(dtype)
    limit = 300.0 if wide == torch.float64 else 40.0
    shifted = any((head.scale + view.shrink) / view.temperature > limit for view in views)

    scores = unit.new_empty(n * chunk, dtype=wide)
    powers = unit.new_empty(count * n * chunk, dtype=wide)
    product = scores if dtype == wide else unit.new_empty(n * chunk, dtype=dtype)
    narrow = powers if dtype == wide else unit.new_empty(count * n * chunk, dtype=dtype)
    total = unit.new_zeros(count, n, dtype=torch.float64)
    peak = unit.new_full((count, n), -math.inf if shifted else 0.0, dtype=wide)
    mean = unit.new_zeros(count * n, width, dtype=wide) if means else None
    label_score = unit.new_zeros(n, dtype=wide)
    top = unit.new_full((n,), -math.inf, dtype=wide)
    if labels is not None:  # in full precision, whatever the products have
        label_score = (unit * class_rows(head, labels, unit)).sum(1).mul(head.scale).to(wide)

    for first in range(0, head.num_classes, chunk):
        rows = weight[first : first + chunk].to(device=unit.device, dtype=dtype)  # (c, D)
        size = len(rows)
        z, e = scores[: n * size].view(n, size), powers[: count * n * size].view(count, n, size)
        torch.mm(scaled, rows.T, out=product[: n * size].view(n, size))
        if dtype != wide:
            z.copy_(product[: n * size].view(n, size))
        part = None
        if row_scale is not None:
            part = row_scale[first : first + size].to(device=unit.device, dtype=wide)
            z.mul_(part)
        if labels is not None:
            place = (labels - first).clamp(0, size - 1)[:, None]
            here = (labels >= first) & (labels < first + size)
            z.scatter_(1, place, torch.where(here, label_score, z.gather(1, place)[:, 0])[:, None])
        if best:
            top = torch.maximum(top, z.amax(1))
        for number, view in enumerate(views):
            power = e[number]
            if view.temperature == 1 and not shifted and not view.shrink:
                torch.exp(z, out=power)
            else:
                torch.mul(z, 1 / view.temperature, out=power)
                if view.shrink and labels is not None:
                    less = here.to(wide) * (-view.shrink / view.temperature)
                    power.scatter_add_(1, place, less[:, None])
                if shifted:
                    new = torch.maximum(peak[number], power.amax(1))
                    fade = (peak[number] - new).exp()
                    total[number] *= fade
                    if mean is not None:
                        mean[number * n : (number + 1) * n] *= fade[:, None]
                    peak[number] = new
                    power.sub_(new[:, None])
                power.exp_()
            total[number] += power.sum(1)
        if mean is not None:
            if part is not None:
                e.mul_(part)
            flat = e.view(count * n, size)
            if dtype == wide:
                mean.addmm_(flat, rows)
            else:
                cast = narrow[: count * n * size].view(count * n, size).copy_(flat)
                mean += cast @ rows

    sums = []
    for number, view in enumerate(views):
        log_sum = total[number].log() + peak[number].double()
        log_label = None
        if labels is not None:  # by the very number that is in the sum, so that it is never above 0
            log_label = (label_score.double() - view.shrink) / view.temperature - log_sum
        rows = None
        if mean is not None:
            rows = mean[number * n : (number + 1) * n]
            rows.div_(total[number].to(wide)[:, None])
        sums.append(Sums(log_sum, rows, log_label))
    return sums, (label_score >= top) if best and labels is not None else None
