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
# Less than an hour on two quiet cores that compute bf16 (AID at 128 pixels: features 2 minutes,
# teacher 8, its answers 2, a student 15 and its twin from labels as much, exits 3, evaluation 3).
# A network trained on ImageNet learns the classes, says once what it thinks of the eight turns and
# mirror images of every training image, and a small GFNet learns from these answers alone, long and
# patiently. Trained by its last head alone a student has weak exits (docs/gfnet_dynn.md has
# numbers): deep supervision strengthens them.
SHORT: dict[str, Any] = {
    "teacher": "lite0",
    "backbone_arch": "gfnet-xs",
    "backbone_dim": 64,
    "student_arch": "gfnet-xs",
    "student_dim": 64,
    "patch_size": 8,
    "input_size": 128,
    "backbone_epochs": None,  # by the number of images: of AID's 5 and 36
    "student_epochs": None,
    "deep_supervision": 0.75,
    "backbone_lr": 5e-4,
    "student_lr": 2e-3,
    "finetune_batch": 64,
    "finetune_wd": 0.02,
    "finetune_warmup": 1,
    "answers": "stored",
    "label_weight": 0.0,
    "nd_weight": 0.0,
    "compare_labels": True,
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

# COMMAND  packages/gfnet_dynn/main.py --data-path images --scale finetune --init gfnet-xs.pth
# The official release's transfer of an ImageNet GFNet to another data set: 1000 epochs of AdamW at
# 1e-4, weight decay 1e-4, five of warm-up, mixup, cutmix, smoothing. It then gets exits; no
# student. Source: github.com/raoyongming/GFNet, its README on transfer.
FINETUNE: dict[str, Any] = {
    "no_distil": True,
    "backbone_arch": "gfnet-xs",
    "backbone_epochs": 1000,
    "backbone_lr": 1e-4,
    "finetune_batch": 512,
    "finetune_wd": 1e-4,
    "finetune_warmup": 5,
    "num_epoch": 100,
    "max_warmup_epoch": 15,
    "gate_lr": 0.01,
}

RECIPES = {"full": FULL, "short": SHORT, "finetune": FINETUNE, "rehearsal": REHEARSAL}
