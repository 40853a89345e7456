"""What a step minimises, by ``distillation.mode``: from a batch to a loss, labels or no labels.

An objective is called with the batch and the student's logits. The teacher's logits come from a
:class:`TeacherSource`: replayed from disk, computed now, or from a teacher that learns too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpkd.model.networks import PLAIN, Sight, sight_of
from mpkd.trainer.distillation_loss import DistillationLoss, MixedLoss, apprentice_loss
from shared_core.for_torch.data import TorchBatch
from shared_core.knowledge import KnowledgeStore

Objective = Callable[[TorchBatch, Tensor], Tensor]  # (batch, student logits) -> loss
TeacherSource = Callable[[TorchBatch], Tensor]


class StoredTeacher:
    """The teacher's logits of this view, from disk.

    Args:
        store: one view id a view.
        keys: content keys of the training images, in their order.
        device: where the logits go.
    """

    def __init__(self, store: KnowledgeStore, keys: list[str], *, device: torch.device) -> None:
        self.store, self.keys, self.device = store, keys, device

    def __call__(self, batch: TorchBatch) -> Tensor:
        wanted = [self.keys[n] for n in batch.indices.tolist()]
        return torch.from_numpy(self.store.get(wanted, batch.view_id)).to(self.device)


class LiveTeacher:
    """The teacher's logits, computed now, without gradients.

    Args:
        teacher: the network.
        autocast: the context that it computes in.
        seen: how the student sees the images of a batch.
    """

    def __init__(
        self, teacher: nn.Module, *, autocast: Callable[[], Any], seen: Sight = PLAIN
    ) -> None:
        self.teacher, self.autocast = teacher.eval().requires_grad_(False), autocast
        self.seen = seen

    @torch.no_grad()
    def __call__(self, batch: TorchBatch) -> Tensor:
        with self.autocast():
            return self.teacher(sight_of(self.teacher).of(batch.images, self.seen)).float()


class LearningTeacher:
    """A teacher that is trained beside the student: its logits carry gradients.

    Attributes:
        teacher: the network.
        logits: its answer to the batch at hand; whoever computes the student's sets it.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.logits = teacher, torch.empty(0)

    def __call__(self, batch: TorchBatch) -> Tensor:
        return self.logits


def make_objective(
    config: Mapping[str, Any], teacher: TeacherSource | None, *, smoothing: float = 0.0
) -> Objective:
    """The objective of ``distillation.mode``; ``smoothing`` of the labels in mode ``labels``.

    ``teacher_only`` never touches ``batch.labels``; a test trains with permuted labels and
    compares the weights bit by bit.

    Raises:
        ValueError: no teacher, and the mode has one.
    """
    mode = config["distillation.mode"]
    if mode == "labels":
        return lambda batch, logits: nn.functional.cross_entropy(
            logits.float(), batch.labels, label_smoothing=smoothing
        )
    if teacher is None:
        raise ValueError(f"mode {mode} has no teacher, expected one")
    if mode.startswith("apprentice"):
        learns = isinstance(teacher, LearningTeacher)
        return lambda batch, logits: apprentice_loss(
            logits, teacher(batch), batch.labels, train_teacher=learns
        )
    measure = DistillationLoss(
        config["distillation.loss"], temperature=config["distillation.temperature"]
    )
    if mode == "mixed":
        mixture = MixedLoss(measure, alpha=config["distillation.alpha"])
        return lambda batch, logits: mixture(logits, teacher(batch), batch.labels)
    return lambda batch, logits: measure(logits, teacher(batch))
