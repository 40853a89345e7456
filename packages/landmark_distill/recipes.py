"""The two published recipes and ours of trained bodies, as values of the options."""

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
PUBLISHED: dict[str, dict[str, Any]] = {
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
# Ours: what a folder of images gets where nothing else is asked for. A trained body, whose norms
# stay as they are, a feature layer that keeps what it knows, and few, small steps.
LITE0 = "lite0"
FINE_TUNING: dict[str, Any] = {
    "backbone_class": "efficientnet_lite0",
    "input_size": 192,
    "batch_size": 32,
    "epochs": 4,
    "warmup_epoch": 1,
    "cosine": "corrected",
    "optim": "AdamW",
    "lr": 1e-4,
    "weight_decay": 0.02,
    "weight_decay_on": "matrices",
    "body_rate": 1.0,
    "layer_decay": 0.9,
    "augment": True,
    "crop_scale": (0.4, 1.0),
    "lighting": 0.0,
    "resize": "area",
    "channels_last": True,
    "amp": "auto",
    "choose_by": "auto",
    "validation_share": 0.15,
}
# Beside a teacher (--teacher_init_weights): its features through its frozen head.
TAUGHT_BY_LITE2: dict[str, Any] = {
    "is_distill": True,
    "teacher_backbone_class": "efficientnet_lite2",
    "kd_loss": "cosine",
    "kd_weight": 10.0,
    "head_fixed": True,
}
RECIPES = {**PUBLISHED, LITE0: FINE_TUNING}


def recipe_values(name: str | None, *, taught: bool) -> dict[str, Any]:
    """What a recipe says of the options; nothing without one.

    Args:
        taught: a teacher's file is given.
    """
    return {**RECIPES.get(name or "", {}), **(TAUGHT_BY_LITE2 if name == LITE0 and taught else {})}
