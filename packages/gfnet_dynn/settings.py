"""What a run was asked for, by concern: frozen, plain values for the code below the commands.

``Settings.of`` makes them from a run's configuration, the flat table in ``config.json``; a field is
called as its option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gfnet_dynn.choices import ALL, LITE_ARCHS, SETS, STORED

PATHS = frozenset({"data_path", "pretrained", "student_init", "checkpoint", "quarantine", "split"})
TUPLES = frozenset({"crop_scale", "exits"})


def is_model_file(teacher: str) -> bool:
    """Whether ``--teacher`` names a file; else it is a network's name."""
    return teacher.endswith(".pth") or Path(teacher).is_absolute() or Path(teacher).is_file()


@dataclass(frozen=True)
class Source:
    """Where the images come from and how they are split."""

    data_set: str
    data_path: Path | None  # None: built-in scenes
    input_size: int | None  # pixels; None: the set's own
    num_classes: int | None
    split_ratio: float
    split_seed: int
    builtin_classes: int
    builtin_images: int  # a class
    split: Path | None  # a manifest that decides
    num_workers: int
    quarantine: Path | None
    # None, as in runs of earlier versions, is the core's usual way.
    group_by: Literal["near", "exact"] | None  # copies that stay in one split
    drop_leaks: bool | None

    @property
    def known(self) -> bool:
        """Whether facts of a published set belong to the name."""
        return self.data_set in SETS


@dataclass(frozen=True)
class Views:
    """How images are cut and changed on their way to a network."""

    crop_scale: tuple[float, float]
    vflip: bool
    aa: str  # RandAugment policy, or none
    color_jitter: float
    reprob: float
    remode: str
    recount: int
    train_interpolation: str
    crop_pct: float


@dataclass(frozen=True)
class Networks:
    """The sizes of backbone and student, and what they start from."""

    backbone_arch: str
    backbone_dim: int | None
    student_arch: str
    student_dim: int | None
    depth: int | None
    patch_size: int
    drop_path: float
    filter: str
    pretrained: Path | None
    resolution_transfer: str
    student_init: Path | None
    teacher: str | None  # a model file of this project, or a network's name
    no_distil: bool

    @property
    def teacher_network(self) -> str | None:
        """The name of a trained network that is fine-tuned to be the teacher."""
        if self.teacher is None:
            return self.backbone_arch if self.backbone_arch in LITE_ARCHS else None
        return None if is_model_file(self.teacher) else self.teacher

    @property
    def teacher_file(self) -> Path | None:
        """A finished model that is the teacher as it is."""
        return None if self.teacher is None or self.teacher_network else Path(self.teacher)


@dataclass(frozen=True)
class FineTuning:
    """How backbone and student learn."""

    backbone_epochs: int | None  # None: by the number of images
    backbone_lr: float
    student_epochs: int | None
    student_lr: float
    finetune_batch: int
    finetune_wd: float
    finetune_warmup: int  # epochs
    clip_grad: float  # 0: off
    ema: float  # 0: off
    mixup: float
    cutmix: float
    smoothing: float
    save_every: int  # steps; 0: after every epoch
    barely_train: bool
    seed: int


@dataclass(frozen=True)
class Distillation:
    """The weights of what the student learns from its teacher."""

    label_weight: float
    kd_weight: float
    kd_temperature: float
    kd_warmup: int  # epochs
    nd_weight: float
    spectrum_weight: float
    answers: str  # of the teacher: live, or stored
    compare_labels: bool


@dataclass(frozen=True)
class DeepLosses:
    """Losses at the exits while the network below them learns; a weight of 0 is none."""

    deep_supervision: float
    deep_kd: float
    deep_temperature: float


@dataclass(frozen=True)
class Exits:
    """Where exits sit and how they learn."""

    exits: tuple[int, ...] | str  # ALL, or blocks from 0
    gate: str
    lr: float
    gate_lr: float | None  # None: lr
    wd: float
    min_lr: float
    batch: int
    ce_ic_tradeoff: float  # lambda, the price of compute
    num_epoch: int
    max_warmup_epoch: int
    patience: int
    bilevel_batch_count: int
    gate_objective: str
    classifier_loss: str
    phase2: str
    barely_train: bool

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The exits' blocks in a network of ``depth`` blocks."""
        return tuple(range(depth - 1)) if self.exits == ALL else tuple(self.exits)


@dataclass(frozen=True)
class Judging:
    """Which rule decides, and what it may lose."""

    policy: str
    max_accuracy_loss: float


@dataclass(frozen=True)
class Settings:
    """All of it."""

    scale: str
    seed: int
    checkpoint: Path | None  # the model to give exits to, or the one to judge
    source: Source
    views: Views
    networks: Networks
    finetuning: FineTuning
    distillation: Distillation
    deep: DeepLosses
    exits: Exits
    judging: Judging

    @property
    def stored_answers(self) -> bool:
        """Whether a student learns from answers that its teacher gave once."""
        return self.distillation.answers == STORED and not self.networks.no_distil

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From a flat configuration; names that belong to no part are passed over."""
        parts = {
            "source": Source,
            "views": Views,
            "networks": Networks,
            "finetuning": FineTuning,
            "distillation": Distillation,
            "deep": DeepLosses,
            "exits": Exits,
            "judging": Judging,
        }
        made = {
            name: part(**{one.name: _value(one.name, values[one.name]) for one in fields(part)})
            for name, part in parts.items()
        }
        checkpoint = _value("checkpoint", values["checkpoint"])
        return cls(values["scale"], values["seed"], checkpoint, **made)


def _value(name: str, value: Any) -> Any:
    if name in PATHS:
        return None if value is None else Path(value)
    if name == "exits" and not value:  # how older runs wrote it
        return ALL
    return tuple(value) if name in TUPLES and value != ALL else value
