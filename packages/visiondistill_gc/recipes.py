"""The recipes behind ``--scale``: each states its command, what it takes and what to expect."""

from __future__ import annotations

from typing import Any

# COMMAND  make repro-visiondistill-garbage DATA_ROOT=<folder holding data101031/> SCALE=full
# The README's recipe at 224 pixels on the user's 64,000 images: 5 folds of 50 epochs, a ResNet50 a
# fold before it. It is made for a GPU; two CPU cores need months. The original starts from
# ImageNet weights, which are not ours to ship: --teacher-pretrained FILE and --init FILE load
# them. Without --init no block is frozen.
FULL: dict[str, Any] = {}

# COMMAND  make repro-visiondistill-garbage DATA_ROOT=<folder holding garbage4_255/> SCALE=short
# Half an hour of one core's time at 64 pixels: other photographs than the original set. Nothing
# starts from ImageNet, so nothing is frozen, nets are smaller and rates higher. What to expect is
# in docs/ledger.md (garbage4-255-short): below the floor of a linear classifier.
SHORT: dict[str, Any] = {
    "data_set": "garbage4_255",
    "input_size": 64,
    "test_share": 0.2,
    "n_splits": 3,
    "decoded_cache": True,
    "cache_size": 96,
    "crop_scale": (0.4, 1.0),
    "crop_padding": 4,
    "rotation": 15.0,
    "teacher": "resnet18",
    "teacher_epochs": 9,
    "teacher_lr": 1e-3,
    "teacher_batch_size": 32,
    "student_scale": 0.35,
    "frozen": 0,
    "dropout": 0.2,
    "hidden": 256,
    "epochs": 15,
    "batch_size": 32,
    "lr": 3e-3,
    "warmup_epochs": 1,
    "mixup_start": 1,
    "schedule": "step",
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "patience": 0,
    "alpha": 0.3,
    "ema": 0.98,
    "compare_seeds": (0, 1, 2),
    "compare_epochs": 5,
}

# COMMAND  make repro-visiondistill-garbage SCALE=rehearsal
# Two to three minutes on two cores, on built-in scenes. Every stage runs as at the other scales;
# the teachers learn, the students have hardly begun to when it ends.
REHEARSAL: dict[str, Any] = {
    "input_size": 48,
    "test_share": 0.2,
    "n_splits": 2,
    "builtin_classes": 4,
    "builtin_images": 110,
    "workers": 1,
    "crop_padding": 4,
    "rotation": 0.0,
    "vflip": 0.5,
    "jitter": (0.2, 0.2, 0.2, 0.0),
    "erasing": 0.0,
    "teacher": "resnet18",
    "teacher_epochs": 5,
    "teacher_lr": 1e-3,
    "teacher_batch_size": 16,
    "student_scale": 0.35,
    "frozen": 0,
    "dropout": 0.2,
    "hidden": 64,
    "epochs": 6,
    "batch_size": 16,
    "lr": 3e-3,
    "warmup_epochs": 1,
    "mixup_start": 5,
    "schedule": "step",
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "ema": 0.9,
    "compare_seeds": (0, 1),
    "compare_epochs": 1,
}

RECIPES = {"full": FULL, "short": SHORT, "rehearsal": REHEARSAL}
