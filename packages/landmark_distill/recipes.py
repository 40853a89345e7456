"""The two published recipes, as values of the options."""

from __future__ import annotations

from typing import Any

LANDMARK_CLASSES = 252_903  # of the published head

_TAUGHT = {
    "batch_size": 256,
    "lr_scheduler": "cosine",
    "augment": True,
    "is_distill": True,
    "teacher_backbone_class": "Swin_base",
    "kd_loss": "KD",
    "kd_weight": 1.0,
    "head_fixed": True,
}
# COMMAND  python packages/landmark_distill/main.py --recipe swin-tiny
#          --teacher_init_weights FILE --train_list ... --val_list ... --test_list ...
# Eight GPUs were recommended. The images, the masks, the label map and the teacher's weights are
# not public, so nobody outside can repeat the published numbers (docs/ledger.md).
RECIPES: dict[str, dict[str, Any]] = {
    "swin-tiny": {
        **_TAUGHT,
        "backbone_class": "Swin_tiny",
        "epochs": 200,
        "warmup_epoch": 10,
        "lr": 1e-3,
        "optim": "AdamW",
    },
    "resnet12": {
        **_TAUGHT,
        "backbone_class": "Resnet12",
        "epochs": 40,
        "warmup_epoch": 0,
        "lr": 1e-2,
        "optim": "SGD",
    },
}
