"""What a step minimises, by ``distillation.mode``: from a batch to a loss, labels or no labels.

An objective is called with the batch and the student's logits. The teacher's logits come from a
:class:`TeacherSource`: replayed from disk, computed now, or from a teacher that learns too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mpkd.deploy.openvino_net import INSTALL, OpenVinoNet
from mpkd.trainer.distillation_loss import DistillationLoss, MixedLoss, apprentice_loss
from shared_core.for_torch.data import TorchBatch
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import UsageError

NEEDS_TEACHER = ("teacher_only", "mixed", "apprentice_a", "apprentice_b", "apprentice_c")
NEEDS_LABELS = ("labels", "mixed", "apprentice_a", "apprentice_b", "apprentice_c")

# (batch, student logits) -> (loss, teacher logits or None)
Objective = Callable[[TorchBatch, Tensor], tuple[Tensor, Tensor | None]]
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
    """The teacher's logits, computed now, without gradients."""

    def __init__(self, teacher: nn.Module, *, autocast: Callable[[], Any]) -> None:
        self.teacher, self.autocast = teacher.eval().requires_grad_(False), autocast

    @torch.no_grad()
    def __call__(self, batch: TorchBatch) -> Tensor:
        with self.autocast():
            return self.teacher(batch.images).float()


def teacher_engine(
    config: Mapping[str, Any], teacher: nn.Module, *, image_size: int, device: torch.device
) -> nn.Module:
    """What computes the teacher's logits by ``distillation.teacher_engine``: itself, or a twin.

    The twin uses as many threads as torch, and bf16 where torch would compute in it.
    """
    if config["distillation.teacher_engine"] == "torch":
        return teacher
    check_engine_device(config, device)
    bf16 = config["mixed_precision.enabled"] and config["mixed_precision.dtype"] == "bf16"
    return OpenVinoNet(
        teacher, image_size=image_size, threads=torch.get_num_threads(),
        precision="bf16" if bf16 else "f32",
    )  # fmt: skip


def check_engine_device(config: Mapping[str, Any], device: torch.device) -> None:
    """Refuse an engine that does not compute where the run does.

    Raises:
        UsageError: OpenVINO on another device than the CPU.
    """
    if config["distillation.teacher_engine"] == "openvino" and device.type != "cpu":
        raise UsageError(
            f"distillation.teacher_engine openvino computes on the CPU, this run on {device}: "
            "expected experiment.device=cpu, or distillation.teacher_engine=torch"
        )


class LearningTeacher:
    """A teacher that is trained beside the student: its logits carry gradients."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def __call__(self, batch: TorchBatch) -> Tensor:
        return self.teacher(batch.images)


def check_mode(config: Mapping[str, Any]) -> None:
    """Refuse settings that the mode contradicts.

    Raises:
        UsageError: names both.
    """
    mode = config["distillation.mode"]
    if config["dataset.unlabelled"] and mode in NEEDS_LABELS:
        raise UsageError(
            f"dataset.unlabelled: mode {mode} reads labels, which these images have not; expected "
            "distillation.mode=teacher_only"
        )
    if mode == "apprentice_a" and config["model.teacher_ckpt"]:
        raise UsageError(
            "model.teacher_ckpt: mode apprentice_a trains its teacher from scratch; expected none, "
            "or distillation.mode=apprentice_b"
        )
    if config["distillation.teacher_engine"] == "openvino":
        _check_openvino(mode)
    if mode != "labels" and not mode.startswith("apprentice"):
        temperature, loss = config["distillation.temperature"], config["distillation.loss"]
        if loss == "mse_logits" and temperature != 1:
            raise UsageError(
                f"distillation.temperature is {temperature}: mse_logits compares logits as they "
                "are, expected 1"
            )


def _check_openvino(mode: str) -> None:
    if mode not in NEEDS_TEACHER or mode == "apprentice_a":
        why = "trains its teacher" if mode == "apprentice_a" else "has no teacher"
        raise UsageError(
            f"distillation.teacher_engine openvino answers for a fixed teacher, mode {mode} {why}: "
            "expected distillation.teacher_engine=torch"
        )
    if find_spec("openvino") is None:
        raise UsageError(
            "distillation.teacher_engine is openvino, which is not installed: expected "
            f"distillation.teacher_engine=torch, or {INSTALL}"
        )


def make_objective(config: Mapping[str, Any], teacher: TeacherSource | None) -> Objective:
    """The objective of ``distillation.mode``.

    ``teacher_only`` never touches ``batch.labels``; a test trains with permuted labels and
    compares the weights bit by bit.
    """
    mode = config["distillation.mode"]
    if mode == "labels":

        def labels_only(batch: TorchBatch, logits: Tensor) -> tuple[Tensor, Tensor | None]:
            return nn.functional.cross_entropy(logits.float(), batch.labels), None

        return labels_only
    if teacher is None:
        raise ValueError(f"mode {mode} has no teacher, expected one")
    if mode.startswith("apprentice"):
        joint = mode == "apprentice_a"

        def apprentice(batch: TorchBatch, logits: Tensor) -> tuple[Tensor, Tensor | None]:
            wanted = teacher(batch)
            loss = apprentice_loss(logits, wanted, batch.labels, train_teacher=joint)
            return loss, wanted.detach()

        return apprentice
    measure = DistillationLoss(
        config["distillation.loss"], temperature=config["distillation.temperature"]
    )
    if mode == "mixed":
        mixture = MixedLoss(measure, alpha=config["distillation.alpha"])

        def mixed(batch: TorchBatch, logits: Tensor) -> tuple[Tensor, Tensor | None]:
            wanted = teacher(batch)
            return mixture(logits, wanted, batch.labels), wanted

        return mixed

    def teacher_only(batch: TorchBatch, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        wanted = teacher(batch)
        return measure(logits, wanted), wanted

    return teacher_only
