"""Which distillation loss the shared head gives: canonical or as in the original, and features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.config import KD_VARIANTS
from landmark_distill.head.cosine_head import CosineMarginHead


@dataclass(frozen=True)
class KDSettings:
    """A Kullback-Leibler loss between the teacher's and the student's softmax over all classes.

    ``canonical`` is Hinton's: both sides at temperature ``T``, times ``T^2``, mean over the batch;
    no margin on either side, for the margin is a trick of the cross-entropy and no part of what
    the teacher knows.

    ``original`` is the published code's: the student at ``T``, the teacher at 1, no ``T^2``, summed
    over the batch (so its weight grows with the batch), the margin on both sides.

    Args:
        variant: ``"canonical"`` or ``"original"``.
        temperature: ``T > 0``; the published code has 4.

    Raises:
        ValueError: an unknown variant, or a temperature that is not positive.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; LandMark_distill, trainer.py.
    """

    variant: str = "canonical"
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if self.variant not in KD_VARIANTS:
            raise ValueError(f"kd_variant is {self.variant!r}, expected one of {KD_VARIANTS}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"kd_temperature is {self.temperature}, expected more than 0")

    @property
    def teacher_temperature(self) -> float:
        """What divides the teacher's scores."""
        return self.temperature if self.variant == "canonical" else 1.0

    def shrink(self, head: CosineMarginHead) -> float:
        """What the label's score loses on both sides: ``scale * margin``, or nothing."""
        return head.scale * head.margin if self.variant == "original" else 0.0

    def reduce(self, per_sample: Tensor) -> Tensor:
        """The loss from the divergences of the samples, ``(N,)`` nats."""
        if self.variant == "original":
            return per_sample.sum()
        return per_sample.mean() * self.temperature**2

    def facts(self, head: CosineMarginHead) -> dict[str, Any]:
        """What a stored soft label depends on beside the image: part of a store's view."""
        return {
            "soft_label": "softmax-mean class weight, entropy, label probability",
            "teacher_temperature": self.teacher_temperature,
            "shrink": self.shrink(head),
            "scale": head.scale,
            "num_classes": head.num_classes,
        }


@dataclass(frozen=True)
class HeadLosses:
    """What a batch costs at the head.

    Args:
        ce: mean cross-entropy, with margin if the head is in training mode; None without labels.
        kd: distillation loss, reduced as its variant says; None without soft labels.
        correct: bool ``(N,)``, whether the label has the largest score without margin, or None.
    """

    ce: Tensor | None
    kd: Tensor | None
    correct: Tensor | None


def kd_from_logits(student: Tensor, teacher: Tensor, kd: KDSettings) -> Tensor:
    """The same loss from whole logits ``(N, C)``, with the margin that they come with."""
    log_q = F.log_softmax(student / kd.temperature, dim=1)
    log_p = F.log_softmax(teacher.detach() / kd.teacher_temperature, dim=1)
    return kd.reduce(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1))


def full_losses(
    features: Tensor,
    head: CosineMarginHead,
    *,
    labels: Tensor | None = None,
    teacher_features: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_head: CosineMarginHead | None = None,
    kd: KDSettings | None = None,
) -> HeadLosses:
    """The losses through whole logits: for a head that learns, and what the streamed ones equal.

    Args:
        features: ``(N, D)``.
        head: any; its weight gets a gradient if it wants one.
        labels: int64 ``(N,)``, or None for no cross-entropy.
        teacher_features: ``(N, D)``; without them and ``teacher_logits`` there is no distillation.
        teacher_logits: ``(N, C)`` without margin, instead of the features.
        teacher_head: None when it is the same head.
        kd: the variant; canonical at 4 by default.

    Raises:
        ValueError: ``original`` without labels.
    """
    kd = kd or KDSettings()
    cosine = head.scale * head.cosine(features)  # (N, C)
    ce = soft = correct = None
    if labels is not None:
        shrink = head.scale * head.margin if head.training else 0.0
        ce = F.cross_entropy(_shrunk(cosine, labels, shrink), labels)
        plain = cosine.detach()
        correct = plain.gather(1, labels[:, None])[:, 0] >= plain.amax(1)
    if teacher_features is not None or teacher_logits is not None:
        other = teacher_head or head
        check_labels_for(kd, labels)
        with torch.no_grad():
            if teacher_logits is None:
                teacher_logits = other.scale * other.cosine(teacher_features)
            teacher = _shrunk(teacher_logits, labels, kd.shrink(other))
        soft = kd_from_logits(_shrunk(cosine, labels, kd.shrink(head)), teacher, kd)
    return HeadLosses(ce, soft, correct)


def check_labels_for(kd: KDSettings, labels: Tensor | None) -> None:
    """The original's margin needs to know whose score to shrink."""
    if kd.variant == "original" and labels is None:
        raise ValueError("labels are None, expected labels: kd_variant original has a margin")


def _shrunk(logits: Tensor, labels: Tensor | None, shrink: float) -> Tensor:
    if labels is None or not shrink:
        return logits
    return logits - shrink * F.one_hot(labels, logits.shape[1]).to(logits.dtype)


def global_kd(student: Tensor, teacher: Tensor, *, variant: str = "canonical") -> Tensor:
    """Squared distance of features ``(N, D)``: ``--kd_loss global_KD``.

    ``original`` sums over features and batch; ``canonical`` sums over features and takes the mean
    over the batch, so that its weight does not depend on the batch size.

    Raises:
        ValueError: shapes differ, or an unknown variant.
    """
    _check_features(student, teacher)
    if variant not in KD_VARIANTS:
        raise ValueError(f"kd_variant is {variant!r}, expected one of {KD_VARIANTS}")
    total = (student.float() - teacher.detach().float()).square().sum()
    return total if variant == "original" else total / len(student)


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos`` of student and teacher features ``(N, D)``, mean over the batch, in [0, 2].

    The head looks at directions only; so does this.

    Raises:
        ValueError: shapes differ.
    """
    _check_features(student, teacher)
    return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=1)).mean()


def _check_features(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher features have shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}, expected two equal shapes (N, D)"
        )
