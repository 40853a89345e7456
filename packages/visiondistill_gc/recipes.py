"""The recipes behind ``--scale``: each states its command, what it takes and what to expect."""

from __future__ import annotations

from typing import Any

LITE0, LITE2 = "efficientnet_lite0", "efficientnet_lite2"

# COMMAND  make repro-visiondistill-garbage DATA_ROOT=<folder holding data101031/> SCALE=full
# The README's recipe at 224 pixels on the user's 64,000 images: 5 folds of 50 epochs, a ResNet50 a
# fold before it. It is made for a GPU; two CPU cores need months. Both networks start from
# ImageNet weights as the original: paddle.vision downloads them, or --teacher-pretrained FILE and
# --init FILE load them. With --init none no block is frozen.
FULL: dict[str, Any] = {}

# What short and rehearsal share: fine-tuning from a probe. Heads start from a linear classifier of
# stored features, the teacher is that classifier above trained features, early blocks are frozen.
FINE_TUNING: dict[str, Any] = {
    "teacher": LITE2,
    "teacher_epochs": 0,
    "teacher_lr": 2e-4,
    "teacher_frozen": 16,
    "teacher_batch_size": 16,
    "student": LITE0,
    "frozen": 14,
    "dropout": 0.1,
    "probe": True,
    "lr": 3e-4,
    "head_rate": 3.0,
    "warmup_epochs": 1,
    "mixup_start": 1,
    "schedule": "step",
    "optimizer": "adamw",
    "weight_decay": 0.02,
    "label_smoothing": 0.1,
    "clip_grad": 5.0,
    "patience": 0,
    "ema": 0.98,
}

# COMMAND  make repro-visiondistill-garbage DATA_ROOT=<folder holding garbage4_255/> SCALE=short
# Half an hour of two cores' time at 192 pixels: other photographs than the original set, and the
# recipe for a folder of your own. What to expect is in docs/ledger.md (garbage4-255-short).
SHORT: dict[str, Any] = {
    **FINE_TUNING,
    "data_set": "garbage4_255",
    "input_size": 192,
    "decoded_cache": True,
    "cache_size": 256,
    "crop_scale": (0.4, 1.0),
    "crop_padding": 0,
    "rotation": 15.0,
    "vflip": 0.1,
    "jitter": (0.2, 0.2, 0.2, 0.02),
    "erasing": 0.1,
    "epochs": 3,
    "compare_seeds": (0, 1, 2),
    "compare_epochs": 1,
}

# COMMAND  make repro-visiondistill-garbage SCALE=rehearsal
# Two to three minutes on two cores, on built-in scenes: the recipe of short in small.
REHEARSAL: dict[str, Any] = {
    **FINE_TUNING,
    "input_size": 64,
    "test_share": 0.2,
    "n_splits": 2,
    "builtin_classes": 4,
    "builtin_images": 110,
    "workers": 1,
    "crop_scale": (0.5, 1.0),
    "crop_padding": 0,
    "rotation": 0.0,
    "vflip": 0.5,
    "jitter": (0.2, 0.2, 0.2, 0.0),
    "erasing": 0.0,
    "epochs": 3,
    "compare_seeds": (0, 1),
    "compare_epochs": 1,
}

# With --init none: longer, all of it, and a teacher that learns.
FROM_NOTHING: dict[str, Any] = {
    "teacher": "resnet18",
    "teacher_epochs": 9,
    "teacher_lr": 1e-3,
    "student": "mobilenet_v2",
    "student_scale": 0.35,
    "hidden": 256,
    "epochs": 15,
    "lr": 3e-3,
    "head_rate": 1.0,
    "label_smoothing": 0.0,
    "compare_epochs": 5,
}

RECIPES = {"full": FULL, "short": SHORT, "rehearsal": REHEARSAL}
