"""What a scale changes in the configuration; ``full`` is config.yaml as it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCALES = ("full", "short", "rehearsal")

# COMMAND  python packages/mpkd/main.py --data-root <folder with CIFAR10> --scale short
# A look at the whole chain on real images: few epochs, a tenth of the images.
SHORT: dict[str, Any] = {
    "experiment.epochs": 6,
    "experiment.batch_size": 64,
    "dataset.max_images": 5_000,
    "teacher.epochs": 4,
    "distillation.views": 3,
    "quantization.calib_samples": 256,
    "quantization.brecq_steps": 1_000,
    "quantization.haq_episodes": 60,
}

# COMMAND  python packages/mpkd/main.py --data-path <folder with class folders>
# Images of one's own: minutes on two cores. Both start from trained weights; the teacher is lite2
# where that is installed (an epoch of it costs two of the student), else lite0.
FOLDER: dict[str, Any] = {
    "model.student_model": "lite0",
    "teacher.epochs": 4,
    "experiment.epochs": 6,
    "experiment.batch_size": 64,
    "experiment.learning_rate": 3.0e-3,
    "distillation.views": 3,
    "export.qdq": True,
}

# COMMAND  python packages/mpkd/main.py --scale rehearsal
# scikit-learn's digits: every stage in about a minute, and no claim rests on it.
REHEARSAL: dict[str, Any] = {
    "dataset.name": "digits",
    "dataset.image_size": 16,
    "dataset.workers": 1,
    "experiment.epochs": 12,
    "experiment.batch_size": 32,
    "model.teacher_model": "simple_cnn",
    "model.student_widths": [16, 32, 64],
    "teacher.epochs": 10,
    "distillation.views": 3,
    "quantization.calib_samples": 128,
    "quantization.epochs": 2,
    "quantization.brecq_steps": 150,
    "quantization.haq_episodes": 10,
    "logging.log_interval": 0,
}

OVERRIDES: dict[str, dict[str, Any]] = {"full": {}, "short": SHORT, "rehearsal": REHEARSAL}


# -- the matrix -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A matrix at a scale.

    Attributes:
        changes: keys of the configuration.
        threads: of the CPU; 0 = torch's choice.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    threads: int = 0


_TRAINING: dict[str, Any] = {
    "training.lr_warmup_steps": 20,
    "training.clip": 5.0,
    "logging.log_interval": 0,
    "quantization.learning_rate": 5.0e-4,
}

# COMMAND  make repro-mpkd-cifar10 DATA_ROOT=<folder holding CIFAR10>
# Takes a GPU, or a day of a CPU.
CIFAR10_FULL = Setting(
    _TRAINING
    | {
        "experiment.epochs": 60,
        "model.teacher_model": "lite2",
        "model.teacher_size": 160,
        "teacher.epochs": 10,
        "distillation.views": 20,
        "quantization.epochs": 10,
        "quantization.calib_samples": 1024,
        "training.channels_last": True,
    }
)
# COMMAND  make repro-mpkd-cifar10 DATA_ROOT=<folder holding CIFAR10> SCALE=short
# Within an hour of two CPU cores. 5,000 of the 50,000 training images (the record says "subset"),
# all 10,000 test images. The teacher starts from trained weights and sees the 32 pixels enlarged
# to 128; its answers to four views (shift and flip) are stored once, and every student of 32
# pixels learns from these.
CIFAR10_SHORT = Setting(
    _TRAINING
    | {
        "experiment.epochs": 24,
        "experiment.batch_size": 64,
        "dataset.max_images": 5_000,
        "dataset.val_split": 0.02,
        "dataset.workers": 1,
        "model.teacher_model": "lite0",
        "model.teacher_size": 128,
        "teacher.epochs": 4,
        "distillation.views": 4,
        "model.student_widths": [16, 32, 64],
        "quantization.epochs": 2,
        "quantization.calib_samples": 256,
    },
    threads=2,
)
# COMMAND  make repro-mpkd-cifar10 SCALE=rehearsal
# scikit-learn's digits at 16 pixels: every cell of the matrix; no claim rests on it.
REHEARSE = Setting(
    _TRAINING
    | {
        "dataset.name": "digits",
        "dataset.image_size": 16,
        "dataset.workers": 0,
        "dataset.max_images": 600,
        "experiment.epochs": 12,
        "experiment.batch_size": 32,
        "model.teacher_model": "simple_cnn",
        "model.student_widths": [8, 16, 32],
        "teacher.epochs": 12,
        "teacher.learning_rate": 4.0e-3,
        "distillation.views": 2,
        "quantization.epochs": 1,
        "quantization.calib_samples": 128,
    },
    threads=1,
)
# COMMAND  make repro-mpkd-imagenet DATA_ROOT=<folder holding ImageNet>
# For who has ImageNet and GPUs. The teacher is torchvision's ResNet-18 with its weights: it loads
# them where there is a network, or set model.teacher_ckpt to their file.
IMAGENET_FULL = Setting(
    _TRAINING
    | {
        "dataset.name": "imagenet",
        "dataset.crop": 0.08,
        "model.teacher_model": "resnet18",
        "experiment.epochs": 90,
        "experiment.batch_size": 256,
        "teacher.epochs": 5,
        "teacher.learning_rate": 1.0e-4,
        "distillation.views": 2,
        "dataset.workers": 8,
        "model.student_widths": [64, 128, 256, 256],
        "quantization.epochs": 5,
        "quantization.calib_samples": 1024,
        "training.channels_last": True,
    }
)
IMAGENET_SHORT = Setting(
    IMAGENET_FULL.changes
    | {
        "experiment.epochs": 2,
        "dataset.max_images": 20_000,
        "dataset.image_size": 64,
        "teacher.epochs": 2,
        "distillation.views": 1,
        "quantization.epochs": 1,
    },
    threads=2,
)

MATRIX: dict[tuple[str, str], Setting] = {
    ("cifar10", "full"): CIFAR10_FULL,
    ("cifar10", "short"): CIFAR10_SHORT,
    ("cifar10", "rehearsal"): REHEARSE,
    ("imagenet", "full"): IMAGENET_FULL,
    ("imagenet", "short"): IMAGENET_SHORT,
    ("imagenet", "rehearsal"): REHEARSE,
}


# -- the claims -----------------------------------------------------------------------------------

# COMMAND  python packages/mpkd/claims.py
# All of the digits at their own 8 pixels. The teacher is the student at four times the width: what
# a ResNet-18 adds here is time.
CLAIMS_DIGITS = Setting(
    REHEARSE.changes
    | {
        "dataset.image_size": 8,
        "dataset.max_images": 0,
        "experiment.epochs": 12,
        "experiment.batch_size": 64,
        "experiment.learning_rate": 1.0e-2,
        "distillation.views": 4,
        "quantization.epochs": 3,
        "quantization.learning_rate": 1.0e-3,
        "quantization.calib_samples": 256,
    }
)
# COMMAND  python packages/mpkd/claims.py --data-root <folder holding CIFAR10>
# The matrix's subset of CIFAR-10 and its teacher. Hours on a CPU: --what takes claims one by one.
CLAIMS_CIFAR10 = Setting(CIFAR10_SHORT.changes)
