"""What ``reproduce.py`` runs at each scale: sizes of the data, teacher and students."""

from __future__ import annotations

from dataclasses import dataclass

from landmark_distill.config import DrawnScenes

# The published images are not public. What stands in for them, and how it lies below --data-root.
STAND_INS = {
    "resnet12": ("omniglot_small", "<alphabet>/<character>/*.png"),
    "swin-tiny": ("omniglot_small", "<alphabet>/<character>/*.png"),
    "lite0": ("grocery192", "<part>/<coarse class>/<fine class>/*.jpg"),
}
ORIGINS = {
    "omniglot_small": "brendenlake/omniglot",
    "grocery192": "marcusklasson/GroceryStoreDataset",
}


@dataclass(frozen=True)
class Arm:
    """How a student learns, in words and in options of ``main.py``."""

    label: str
    options: tuple[str, ...]


TEACHER = "teacher"
METRICS = {
    "vr_0.1": "VR at FAR 0.1",
    "vr_0.01": "VR at FAR 0.01",
    "vr_0.001": "VR at FAR 0.001",
    "recall_at_1": "recall@1",
    "map_at_r": "mAP@R",
    "coarse_vr_0.01": "coarse VR at FAR 0.01",
}
# How the students that are compared learn. The first is the published method.
ARMS = {
    "fixed": Arm("the teacher's frozen head", ("--is_distill", "--head_fixed")),
    "own": Arm("a head of its own, distilled", ("--is_distill",)),
    "none": Arm("a head of its own, labels alone", ()),
}


@dataclass(frozen=True)
class Setting:
    """One scale of one recipe; words are options of ``main.py``.

    Attributes:
        common: of teacher and students.
        teacher: what only the teacher has.
        student: what only the students have.
        distilled: what only distilled students have.
        arms: the kinds of students, names of ``ARMS``; the first is compared with each other.
        drawn: the scenes of a rehearsal.
        threads: of the CPU; 0 = torch's choice.
    """

    common: tuple[str, ...]
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    distilled: tuple[str, ...]
    arms: tuple[str, ...] = tuple(ARMS)
    drawn: DrawnScenes | None = None
    threads: int = 0


def words(text: str) -> tuple[str, ...]:
    """A command line's words."""
    return tuple(text.split())


SCENES = DrawnScenes(num_classes=45, images_per_class=24, image_size=32, seed=0)
_SGD = "--optim SGD --momentum 0.9 --cosine corrected --lr 0.1"
_DRAWINGS = "--augment --crop_scale 0.6 1 --hflip 0 --lighting 0 --resize area --num_workers 2"
_SCENES = "--augment --crop_scale 0.5 1 --hflip 0.5 --lighting 0 --num_workers 1"

# COMMAND  make repro-landmark-resnet12 DATA_ROOT=<folder holding omniglot_small/> SCALE=short
# 2,376 training images of 132 characters: a net that trains for long comes to know them by heart
# and gets worse among unseen ones. So the teacher has few epochs, and the students fewer: the
# question is what a student with a small budget gains from a teacher. A Swin-base learns too
# little from so few images; the teacher is a ResNet12 too. Chosen on the validation alphabets.
RESNET12_SHORT = Setting(
    common=words(f"--image_size 32 --feature_dim 128 --batch_size 64 {_DRAWINGS} {_SGD}"),
    teacher=words("--backbone_class Resnet12 --drop_block 0 --max_epoch 10 --warmup_epoch 1"),
    student=words("--backbone_class Resnet12 --drop_block 0 --max_epoch 4 --warmup_epoch 1"),
    distilled=words("--kd_weight 1 --kd_temperature 4"),
)
# COMMAND  make repro-landmark-resnet12 SCALE=rehearsal
RESNET12_REHEARSAL = Setting(
    common=words(f"--image_size 32 --feature_dim 64 --batch_size 32 {_SCENES} {_SGD}"),
    teacher=words("--backbone_class Resnet12 --drop_block 0 --max_epoch 24 --warmup_epoch 2"),
    student=words("--backbone_class Resnet12 --drop_block 0 --max_epoch 8 --warmup_epoch 1"),
    distilled=words("--kd_weight 1 --kd_temperature 4"),
    drawn=SCENES,
    threads=1,
)

_ADAM = "--optim AdamW --cosine corrected --lr 0.001 --weight_decay 0.05 --weight_decay_on matrices"
_SMALL_BASE = "--backbone_class Swin_base --depths 2,2,6,2 --heads 2,4,8,16 --drop_path 0.1"
_SMALL_TINY = "--backbone_class Swin_tiny --depths 1,1,2,1 --heads 1,2,4,8 --drop_path 0"
# COMMAND  make repro-landmark-swin-tiny DATA_ROOT=<folder holding omniglot_small/> SCALE=short
SWIN_TINY_SHORT = Setting(
    common=words(
        f"--image_size 48 --feature_dim 128 --window 3 --batch_size 64 {_DRAWINGS} {_ADAM}"
    ),
    teacher=words(f"{_SMALL_BASE} --max_epoch 60 --warmup_epoch 5"),
    student=words(f"{_SMALL_TINY} --max_epoch 16 --warmup_epoch 2"),
    distilled=words("--kd_weight 1 --kd_temperature 4"),
)
# COMMAND  make repro-landmark-swin-tiny SCALE=rehearsal
SWIN_TINY_REHEARSAL = Setting(
    common=words(f"--image_size 32 --feature_dim 64 --window 2 --batch_size 32 {_SCENES} {_ADAM}"),
    teacher=words(
        "--backbone_class Swin_base --depths 1,1,4,1 --heads 1,2,4,8 "
        "--max_epoch 24 --warmup_epoch 2"
    ),
    student=words(
        "--backbone_class Swin_tiny --depths 1,1,2,1 --heads 1,2,4,8 --drop_path 0 "
        "--max_epoch 8 --warmup_epoch 1"
    ),
    distilled=words("--kd_weight 1 --kd_temperature 4"),
    drawn=SCENES,
    threads=1,
)


# COMMAND  make repro-landmark-lite0 DATA_ROOT=<folder holding grocery192/> SCALE=short
# Trained bodies: a lite2 tuned on the learned classes teaches a lite0 by its features; beside it
# the same lite0 from labels. Both start as the whitening of their body's features.
LITE0_SHORT = Setting(
    common=words("--recipe lite0 --init trained --input-size 128"),
    teacher=words("--backbone_class efficientnet_lite2 --epochs 3"),
    student=words("--epochs 2"),
    distilled=(),
    arms=("fixed", "none"),
)
# COMMAND  make repro-landmark-lite0 SCALE=rehearsal
LITE0_REHEARSAL = Setting(
    common=words("--recipe lite0 --init trained --input-size 64 --amp fp32"),
    teacher=words("--backbone_class efficientnet_lite0 --epochs 2"),
    student=words("--epochs 2"),
    distilled=words("--teacher_backbone_class efficientnet_lite0"),
    arms=("fixed", "none"),
    drawn=DrawnScenes(num_classes=45, images_per_class=20, image_size=64, seed=0),
)


def _published(recipe: str) -> Setting:
    """The published sizes on a folder of the user's; days on a few GPUs."""
    student = {
        "resnet12": "--backbone_class Resnet12 --max_epoch 40 --lr 0.01 --optim SGD",
        "swin-tiny": "--backbone_class Swin_tiny --max_epoch 200 --warmup_epoch 10 --lr 0.001 "
        "--optim AdamW",
    }[recipe]
    return Setting(
        common=words("--image_size 384 --feature_dim 1024 --batch_size 256 --augment"),
        teacher=words(
            "--backbone_class Swin_base --max_epoch 200 --warmup_epoch 10 --lr 0.001 --optim AdamW"
        ),
        student=words(student),
        distilled=words("--kd_weight 1 --kd_temperature 4"),
    )


SETTINGS = {
    ("resnet12", "short"): RESNET12_SHORT,
    ("resnet12", "rehearsal"): RESNET12_REHEARSAL,
    ("swin-tiny", "short"): SWIN_TINY_SHORT,
    ("swin-tiny", "rehearsal"): SWIN_TINY_REHEARSAL,
    ("lite0", "short"): LITE0_SHORT,
    ("lite0", "rehearsal"): LITE0_REHEARSAL,
    ("lite0", "full"): LITE0_SHORT,
    ("resnet12", "full"): _published("resnet12"),
    ("swin-tiny", "full"): _published("swin-tiny"),
}
