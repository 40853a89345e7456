"""The loss of one batch: the labels, and the teacher by its predictions or by its features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.head.distillation import (
    HeadLosses,
    KDSettings,
    feature_cosine,
    full_losses,
    global_kd,
)
from landmark_distill.head.streamed_loss import soft_labels, streamed_losses
from landmark_distill.model import EmbeddingModel
from landmark_distill.teacher import TeacherOutputs


class Objective(nn.Module):
    """Student and loss as one module, so that a data-parallel wrapper sees every gradient.

    Through a frozen head the losses are streamed, piece by piece of the head; through one that
    learns they come from whole logits. The numbers are the same.

    Args:
        student: learns; its head is its own, or the teacher's, frozen.
        teacher_head: the teacher's, which a student with a head of its own is compared through.
        kd_loss: ``KD``, ``global_KD``, ``cosine``, or None for the labels alone.
        kd_weight, ce_weight: of the two parts.
        kd: variant and temperature.
        processes: that share a batch. What is summed over the batch is multiplied by it, for their
            gradients are averaged.
    """

    def __init__(
        self,
        student: EmbeddingModel,
        *,
        kd_loss: str | None = None,
        teacher_head: CosineMarginHead | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 1.0,
        kd: KDSettings | None = None,
        processes: int = 1,
    ) -> None:
        super().__init__()
        if student.head is None:
            raise ValueError("the student has no head, expected one to learn with")
        self.student, self.kd_loss, self.kd = student, kd_loss, kd or KDSettings()
        self.kd_weight, self.ce_weight = kd_weight, ce_weight
        self.summed = processes if self.kd.variant == "original" else 1
        self._teacher_head = [teacher_head]  # in a list: it is no part of this module

    def forward(self, images: Tensor, labels: Tensor, outputs: TeacherOutputs) -> dict[str, Tensor]:
        """``loss`` with its parts ``ce`` and ``kd``, and how many labels were met (``correct``).

        Args:
            images: ``(N, 3, H, W)``.
            labels: int64 ``(N,)``.
            outputs: the teacher's, as far as ``kd_loss`` needs them.
        """
        features = self.student.embed(images)  # (N, D)
        found = self._at_head(features, labels, outputs)
        kd = found.kd
        if self.kd_loss == "global_KD":
            kd = global_kd(features, outputs.features, variant=self.kd.variant)
        elif self.kd_loss == "cosine":
            kd = feature_cosine(features, outputs.features)
        if kd is None:
            kd = torch.zeros((), device=features.device)
        elif self.kd_loss != "cosine":
            kd = kd * self.summed
        loss = self.ce_weight * found.ce + self.kd_weight * kd
        parts = {"ce": found.ce.detach(), "kd": kd.detach(), "correct": found.correct.sum()}
        return {"loss": loss, **parts}

    def _at_head(self, features: Tensor, labels: Tensor, outputs: TeacherOutputs) -> HeadLosses:
        head = self.student.head
        by_logits = self.kd_loss == "KD"
        stored = outputs.logits if by_logits else None  # the largest ones of a store
        if head.frozen and stored is None:
            soft = outputs.soft if by_logits else None
            if by_logits and soft is None:
                soft = soft_labels(outputs.features, head, labels=labels, kd=self.kd)
            return streamed_losses(features, head, labels=labels, soft=soft, kd=self.kd)
        return full_losses(
            features,
            head,
            labels=labels,
            teacher_features=outputs.features if by_logits else None,
            teacher_logits=stored,
            teacher_head=self._teacher_head[0],
            kd=self.kd,
        )
