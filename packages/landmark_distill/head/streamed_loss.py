"""Cross-entropy and distillation through a frozen head of any size, exact, without the logits.

Teacher and student share one frozen cosine head. With unit class weights ``w_c``, unit features
``u`` and scale ``s``, the scores are ``z_c = s u . w_c``: linear in the feature, with the same
``w_c`` on both sides. Therefore, with ``p`` the teacher's and ``q`` the student's softmax::

    KL(p || q) = sum_c p_c (log p_c - log q_c)
               = -H(p) - sum_c p_c z_c / T + lse(z / T)
               = -H(p) - (s / T) u . m_p + lse(z / T)          m_p = sum_c p_c w_c

    d KL / d u = (s / T) (m_q - m_p)                           m_q = sum_c q_c w_c

    CE         = lse(z') - z'_y,   d CE / d u = s (m' - w_y)   z' = z - s margin [c = y]

The 250,000 probabilities of the teacher enter through ``m_p`` alone: a vector as long as a feature,
with two numbers beside it (:class:`SoftLabels`). It is the exact soft label, and it can be stored.
The student needs the log-sum-exp and the softmax-mean of the rows, which one pass over the head
gives (:func:`stream`); the backward pass needs no pass of its own.

With a margin in the distillation (``original``), ``sum_c p_c z'_c = s u . m_p - s margin p_y``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.head.cosine_head import TINY, CosineMarginHead
from landmark_distill.head.distillation import HeadLosses, KDSettings, check_labels_for
from landmark_distill.head.softmax_sums import Softmax, class_rows, compute_dtype, stream

EXTRA = 4  # numbers of a packed soft label beside the vector


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's softmax over all classes of the shared head, as far as the loss can see it.

    Args:
        mean: softmax-mean of the unit class weights, ``(N, D)``.
        entropy: of the softmax, ``(N,)``, nats.
        label: probability of the label's class, ``(N,)``; 0 where no label was given.
    """

    mean: Tensor
    entropy: Tensor
    label: Tensor

    @property
    def width(self) -> int:
        """Numbers in a packed row, ``D + 4``: the ``classes`` of a knowledge store."""
        return self.mean.shape[1] + EXTRA

    def pack(self) -> np.ndarray:
        """Rows for a knowledge store of ``kind="features"``, float32 ``(N, D + 4)``.

        Entropy and label probability take two numbers each, a float16 and what it leaves, so that
        a store of float16 keeps them to six digits.
        """
        rows = [self.mean.float().cpu().numpy()]
        for value in (self.entropy, self.label):
            value = value.double().cpu().numpy()
            coarse = value.astype(np.float16)
            rows += [coarse[:, None], (value - coarse)[:, None]]
        return np.concatenate([row.astype(np.float32) for row in rows], axis=1)

    @classmethod
    def unpack(cls, rows: Any, *, device: torch.device | str = "cpu") -> SoftLabels:
        """From rows of :meth:`pack`, ``(N, D + 4)``."""
        rows = torch.as_tensor(np.asarray(rows), dtype=torch.float32, device=device)
        scalars = rows[:, -EXTRA:].double()
        return cls(rows[:, :-EXTRA], scalars[:, 0] + scalars[:, 1], scalars[:, 2] + scalars[:, 3])


@torch.no_grad()
def soft_labels(
    features: Tensor,
    head: CosineMarginHead,
    *,
    labels: Tensor | None = None,
    kd: KDSettings | None = None,
    chunk: int | None = None,
) -> SoftLabels:
    """The teacher's side of the distillation, once for each image and view.

    Args:
        features: of the teacher in eval mode, ``(N, D)``, any length.
        head: its head.
        labels: int64 ``(N,)``; needed for ``original``, which has a margin.
        kd: variant and temperature.
        chunk: class weights at a time; None for what suits the device.

    Raises:
        ValueError: shapes or labels that do not fit; ``original`` without labels.
    """
    kd = kd or KDSettings()
    _check(features, head, labels, chunk)
    check_labels_for(kd, labels)
    unit, dtype = _unit(features, head)
    view = Softmax(kd.teacher_temperature, kd.shrink(head))
    (sums,), _ = stream(unit, head, [view], labels=labels, chunk=chunk, dtype=dtype)
    label = torch.zeros_like(sums.log_sum) if sums.log_label is None else sums.log_label.exp()
    expected = head.scale * _dot(unit, sums.mean) - view.shrink * label  # E_p of the scores
    entropy = sums.log_sum - expected / view.temperature
    return SoftLabels(sums.mean, entropy.clamp_min(0), label)


def streamed_losses(
    features: Tensor,
    head: CosineMarginHead,
    *,
    labels: Tensor | None = None,
    soft: SoftLabels | None = None,
    kd: KDSettings | None = None,
    correct: bool = True,
    chunk: int | None = None,
) -> HeadLosses:
    """Cross-entropy and distillation, equal to those through whole logits, in one pass.

    The gradient goes to the features only. It is made in the forward pass; without gradients
    (``torch.no_grad``) that part, two thirds of the work, is left out.

    Args:
        features: of the student, ``(N, D)``, any length, float32, float64 or half.
        head: frozen; its training mode decides about the margin of the cross-entropy.
        labels: int64 ``(N,)`` in ``[0, C)``, or None for no cross-entropy.
        soft: of :func:`soft_labels` with the same ``kd``, or None for no distillation.
        kd: variant and temperature.
        correct: also say which labels have the largest score.
        chunk: class weights at a time; None for what suits the device.

    Raises:
        ValueError: the head wants a gradient; shapes or labels that do not fit.
    """
    kd = kd or KDSettings()
    if not head.frozen:
        raise ValueError(
            "the head requires a gradient, expected a frozen one: the streamed loss gives "
            "gradients to features only (freeze it, or use full_losses)"
        )
    _check(features, head, labels, chunk)
    if soft is not None:
        check_labels_for(kd, labels)
        if soft.mean.shape != features.shape:
            raise ValueError(
                f"soft labels have shape {tuple(soft.mean.shape)}, expected "
                f"{tuple(features.shape)} as the features have"
            )
    if labels is None and soft is None:
        raise ValueError("labels and soft labels are None, expected at least one")
    unit, dtype = _unit(features, head)
    ce, divergence, right = _Streamed.apply(unit, head, labels, soft, kd, correct, chunk, dtype)
    return HeadLosses(
        None if labels is None else ce.mean(),
        None if soft is None else kd.reduce(divergence),
        None if labels is None or not correct else right,
    )


@torch.no_grad()
def label_rows(
    features: Tensor, head: CosineMarginHead, labels: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """For a validation: each sample's cross-entropy without margin, and whether its label is first.

    Products are in float32 at least, also with a bfloat16 head or under autocast.

    Args:
        features: ``(N, D)``, any length.
        head: any, on any device.
        labels: int64 ``(N,)`` in ``[0, C)``.
        chunk: class weights at a time; None for what suits the device.

    Returns:
        float64 ``(N,)``, nats, and bool ``(N,)``.

    Raises:
        ValueError: shapes or labels that do not fit.
    """
    _check(features, head, labels, chunk)
    wide = torch.float64 if torch.float64 in (features.dtype, head.weight.dtype) else torch.float32
    unit = F.normalize(features.to(wide), dim=1, eps=TINY)
    (sums,), best = stream(
        unit, head, [Softmax()], labels=labels, means=False, best=True, chunk=chunk, dtype=wide
    )
    return -sums.log_label, best


class _Streamed(torch.autograd.Function):
    """Per-sample losses; both gradients are at hand when the pass is over."""

    @staticmethod
    def forward(ctx, unit, head, labels, soft, kd, correct, chunk, dtype):  # noqa: D102
        shrink = head.scale * head.margin if head.training and labels is not None else 0.0
        hard, gentle = Softmax(1.0, shrink), Softmax(kd.temperature, kd.shrink(head))
        views = [hard] if labels is not None else []
        if soft is not None and gentle not in views:
            views.append(gentle)
        sums, right = stream(
            unit, head, views,
            labels=labels, means=ctx.needs_input_grad[0], best=correct and labels is not None,
            chunk=chunk, dtype=dtype,
        )  # fmt: skip
        found = dict(zip(views, sums, strict=True))
        ce = divergence = unit.new_zeros(len(unit))
        gradients: list[Tensor | None] = [None, None]
        if labels is not None:
            ce = -found[hard].log_label.to(unit.dtype)
            if found[hard].mean is not None:
                own = class_rows(head, labels, unit)
                gradients[0] = (found[hard].mean - own).mul_(head.scale)
        if soft is not None:
            mean = soft.mean.to(unit)
            expected = head.scale * _dot(unit, mean) - gentle.shrink * soft.label.to(unit.device)
            rest = found[gentle].log_sum - expected / gentle.temperature
            divergence = (rest - soft.entropy.to(unit.device)).to(unit.dtype)
            if found[gentle].mean is not None:
                gradients[1] = (found[gentle].mean - mean).mul_(head.scale / gentle.temperature)
        ctx.save_for_backward(*gradients)
        right = torch.empty(0, dtype=torch.bool) if right is None else right
        ctx.mark_non_differentiable(right)
        return ce, divergence, right

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce, grad_kd, _):  # noqa: D102
        total = None
        for gradient, outer in zip(ctx.saved_tensors, (grad_ce, grad_kd), strict=True):
            if gradient is not None:
                part = gradient * outer[:, None].to(gradient)
                total = part if total is None else total.add_(part)
        return total, None, None, None, None, None, None, None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Row by row, in float64: the divergence is a small difference of large numbers."""
    return (first.double() * second.double()).sum(1)


def _unit(features: Tensor, head: CosineMarginHead) -> tuple[Tensor, torch.dtype]:
    dtype = compute_dtype(features, head.weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return F.normalize(features.to(wide), dim=1, eps=TINY), dtype


def _check(
    features: Tensor, head: CosineMarginHead, labels: Tensor | None, chunk: int | None
) -> None:
    if features.ndim != 2 or features.shape[1] != head.feature_dim or not len(features):
        raise ValueError(
            f"features have shape {tuple(features.shape)}, expected (N, {head.feature_dim}), N > 0"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    if labels is None:
        return
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(features)},)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= head.num_classes:
        raise ValueError(
            f"labels go from {low} to {high}, expected 0 to {head.num_classes - 1} as the head has"
        )
