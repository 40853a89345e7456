"""The two published recipes, and what --scale makes of them where the data are not at hand."""

from __future__ import annotations

from typing import Any

SCALES = ("full", "short", "rehearsal")
LANDMARK_CLASSES = 252_903  # of the published head

# COMMAND  python packages/landmark_distill/main.py --recipe swin-tiny --augment --is_distill
#          --teacher_backbone_class Swin_base --teacher_init_weights FILE --head_fixed
#          --train_list ... --val_list ... --test_list ...
# Eight GPUs were recommended. The images, the masks, the label map and the teacher's weights are
# not public, so nobody outside can repeat the published numbers (docs/ledger.md).
RECIPES: dict[str, dict[str, Any]] = {
    "swin-tiny": {
        "backbone_class": "Swin_tiny",
        "max_epoch": 200,
        "warmup_epoch": 10,
        "batch_size": 256,
        "lr": 1e-3,
        "optim": "AdamW",
        "lr_scheduler": "cosine",
        "augment": True,
        "is_distill": True,
        "teacher_backbone_class": "Swin_base",
        "kd_loss": "KD",
        "kd_weight": 1.0,
        "head_fixed": True,
    },
    "resnet12": {
        "backbone_class": "Resnet12",
        "max_epoch": 40,
        "warmup_epoch": 0,
        "batch_size": 256,
        "lr": 1e-2,
        "optim": "SGD",
        "lr_scheduler": "cosine",
        "augment": True,
        "is_distill": True,
        "teacher_backbone_class": "Swin_base",
        "kd_loss": "KD",
        "kd_weight": 1.0,
        "head_fixed": True,
    },
}
