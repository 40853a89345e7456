"""The recipes behind ``--scale``: each states its command, what it takes and what to expect."""

from __future__ import annotations

from typing import Any

# COMMAND  make repro-gfnet-aid DATA_ROOT=<folder holding AID/> SCALE=full
# Takes minutes on one large GPU at 128 pixels, days on two CPU cores. The published numbers
# (docs/ledger.md) start from ImageNet weights, which are not ours to ship: --init FILE
# loads an official checkpoint; without it the backbone learns from scratch. With the original's
# one rate of 0.001 for heads and gates nobody left early in 19 epochs of phase 2 (built-in scenes
# at 64 pixels); gates at 0.01 left at 80 % of the MACs for two points more accuracy, and did not
# drift from there as at 0.1.
FULL: dict[str, Any] = {
    "backbone_arch": "gfnet-xs",
    "student_arch": "gfnet-xs",
    "student_dim": 256,
    "backbone_epochs": 300,
    "student_epochs": 300,
    "backbone_lr": 1e-3,
    "student_lr": 1e-3,
    "finetune_batch": 128,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.1,
    "num_epoch": 100,
    "max_warmup_epoch": 15,
    "gate_lr": 0.01,
}

# COMMAND  make repro-gfnet-aid DATA_ROOT=<folder holding AID/> SCALE=short
# About 35 minutes on two quiet cores that compute bf16, an hour on two that do not, at 128 pixels.
# Small nets, few epochs, real images: it shows that the method works on the data, not what it
# reaches. Trained by its last head alone a student has weak exits (docs/gfnet_dynn.md has numbers):
# deep supervision strengthens them at a price for the end, which more epochs pay back in part.
SHORT: dict[str, Any] = {
    "backbone_arch": "gfnet-xs",
    "backbone_dim": 128,
    "student_arch": "gfnet-xs",
    "student_dim": 96,
    "input_size": 128,
    "backbone_epochs": 24,
    "student_epochs": 16,
    "deep_supervision": 0.75,
    "backbone_lr": 1.5e-3,
    "student_lr": 1.5e-3,
    "finetune_batch": 32,
    "finetune_warmup": 1,
    "nd_weight": 0.5,
    "smoothing": 0.05,
    "aa": "none",
    "color_jitter": 0.0,
    "crop_scale": (0.5, 1.0),
    "vflip": True,
    "crop_pct": 1.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "amp": "auto",
    "num_epoch": 10,
    "max_warmup_epoch": 5,
    "lr": 0.02,
    "gate_lr": 0.2,
    "bilevel_batch_count": 20,
}

# COMMAND  make repro-gfnet-aid SCALE=rehearsal
# Under 3 minutes on two cores, on built-in scenes. Every stage runs as at the other scales.
REHEARSAL: dict[str, Any] = {
    "threads": 1,  # fastest for nets this small
    "backbone_arch": "gfnet-xs",
    "backbone_dim": 64,
    "student_arch": "gfnet-xs",
    "student_dim": 48,
    "patch_size": 8,
    "input_size": 64,
    "builtin_classes": 6,
    "builtin_images": 440,
    "backbone_epochs": 5,
    "student_epochs": 5,
    "backbone_lr": 1e-3,
    "student_lr": 1e-3,
    "finetune_batch": 16,
    "finetune_warmup": 1,
    "nd_weight": 0.5,
    "smoothing": 0.05,
    "aa": "none",
    "color_jitter": 0.0,
    "crop_scale": (0.6, 1.0),
    "vflip": True,
    "crop_pct": 1.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "num_epoch": 8,
    "max_warmup_epoch": 5,
    "lr": 0.02,
    "gate_lr": 0.2,
    "bilevel_batch_count": 20,
}

RECIPES = {"full": FULL, "short": SHORT, "rehearsal": REHEARSAL}
