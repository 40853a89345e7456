"""The options of landmark_distill: the original's flags, and what took an edit of its code."""

from __future__ import annotations

import argparse
from pathlib import Path

from landmark_distill.data_loader import LIGHTING_ORDERS
from landmark_distill.optimizers import DECAY, OPTIMIZERS
from landmark_distill.recipes import RECIPES
from landmark_distill.schedules import COSINES, SCHEDULERS
from landmark_distill.two_level import LAYOUTS
from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number

BACKBONES = ("Swin_base", "Swin_tiny", "Resnet20", "Resnet12", "Resnet50")
KD_LOSSES = ("KD", "global_KD", "cosine")
KD_VARIANTS = ("canonical", "original")
KNOWLEDGE = ("features", "soft", "topk")
NETWORK = (
    *("window", "depths", "heads", "drop_path"),  # of a Swin
    *("drop_rate", "drop_block", "drop_block_steps"),  # of a Resnet12
    "width",  # of a Resnet20
)

# Flags that have no effect without --is_distill.
DISTILLING = (
    *("teacher_backbone_class", "teacher_init_weights", "kd_loss", "kd_weight", "kd_variant"),
    *("kd_temperature", "head_fixed", "knowledge", "knowledge_kind", "knowledge_top_k"),
    *("mapped_head", "head_dtype", "fill_knowledge"),
)


def _resume(text: str) -> str:
    """``True``, ``False`` or ``auto`` as words; the original took any word for true."""
    words = {"true": "always", "always": "always", "false": "never", "never": "never"}
    found = words.get(text.lower(), text.lower())
    if found not in ("always", "never", "auto"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True, False or auto")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 2,2,6,2") from None


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser; defaults are the original's wherever it had one that could run."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Teach a small network through the frozen classifier of a large one, and test "
        "it by verification among classes that it has not seen.",
        epilog="Results go to --save_dir/<task>/<settings>: record.txt, metrics.jsonl, "
        "max_acc.pth, checkpoint.pth.tar, opensetFeat.npy.",
    )
    g = p.add_argument_group("what to run")
    g.add_argument("--recipe", choices=tuple(RECIPES), help="a published recipe; flags win over it")
    g.add_argument("--test_only", action="store_true", help="no training: test --init_weights")
    g.add_argument(
        "--resume",
        nargs="?",
        const="always",
        default="never",
        type=_resume,
        metavar="True|False|auto",
        help="go on with the run in the task's folder; auto: if there is one",
    )
    g.add_argument("--fresh", action="store_true", help="start anew, delete the run in the folder")
    g.add_argument("--save_dir", type=Path, default=Path("runs/landmark_distill"))
    g.add_argument("--suffix", default="", help="appended to the settings' folder name")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    g.add_argument(
        "--multi_gpu",
        action="store_true",
        help="all GPUs of this machine, one process each; torchrun starts more machines",
    )
    g.add_argument("--threads", type=COUNT, default=0, help="of the CPU; 0 = torch's choice")

    g = p.add_argument_group("model")
    g.add_argument("--backbone_class", default="Resnet12", choices=BACKBONES)
    g.add_argument("--image_size", type=number(int, 8, 4096), default=384, help="pixels")
    g.add_argument("--feature_dim", type=SIZE, default=1024, help="of all networks")
    g.add_argument("--num_classes", type=SIZE, help="rows of the head (default: the data's)")
    g.add_argument("--cos_scale", type=POSITIVE, default=32.0, help="of the cosine head")
    g.add_argument("--cos_margin", type=number(float, 0, 0.99), default=0.1, help="in training")
    g.add_argument("--init_weights", type=Path, help="start from this file; every weight must fit")
    g.add_argument("--window", type=SIZE, help="of a Swin, tokens (default: 1/32 of the image)")
    g.add_argument("--depths", type=_numbers, help="of a Swin's stages, 2,2,6,2")
    g.add_argument("--heads", type=_numbers, help="of a Swin's stages, 2,4,8,16")
    g.add_argument("--drop_path", type=number(float, 0, 0.99), help="of a Swin (default: 0.1)")
    g.add_argument("--drop_rate", type=number(float, 0, 0.99), help="of a Resnet12 (default: 0.1)")
    g.add_argument("--drop_block", type=COUNT, help="of a Resnet12, pixels (default: 5)")
    g.add_argument("--drop_block_steps", type=SIZE, help="until all of it drops (default: 40000)")
    g.add_argument("--width", type=SIZE, help="of a Resnet20 (default: 16)")

    g = p.add_argument_group("distillation")
    g.add_argument("--is_distill", action="store_true", help="learn from a teacher")
    g.add_argument("--teacher_backbone_class", default="", choices=("", *BACKBONES))
    g.add_argument("--teacher_init_weights", type=Path, help="the teacher's file")
    g.add_argument("--kd_loss", default="KD", choices=KD_LOSSES)
    g.add_argument("--kd_weight", type=WEIGHT, default=1.0)
    g.add_argument("--ce_weight", type=WEIGHT, default=1.0, help="of the labels' loss")
    g.add_argument(
        "--kd_variant",
        default="canonical",
        choices=KD_VARIANTS,
        help="canonical: T^2 KL at one temperature, batch mean; original: the temperature divides "
        "the student's logits only, summed over the batch",
    )
    g.add_argument("--kd_temperature", type=POSITIVE, default=4.0)
    g.add_argument("--head_fixed", action="store_true", help="the teacher's head, frozen")
    g.add_argument("--mapped_head", action="store_true", help="map the head instead of reading it")
    g.add_argument("--head_dtype", default="fp32", choices=("fp32", "bf16"), help="of a fixed head")
    g.add_argument(
        "--knowledge", type=Path, help="folder of stored teacher outputs; made when it is missing"
    )
    g.add_argument("--knowledge_kind", default="features", choices=KNOWLEDGE)
    g.add_argument(
        "--fill_knowledge", action="store_true", help="store the outputs for all views, no training"
    )
    g.add_argument("--knowledge_top_k", type=SIZE, default=16, help="logits kept, for topk")

    g = p.add_argument_group("training")
    g.add_argument("--max_epoch", type=SIZE, default=100)
    g.add_argument("--warmup_epoch", type=COUNT, default=0)
    g.add_argument("--batch_size", type=SIZE, default=4, help="of all processes together")
    g.add_argument("--lr", type=POSITIVE, default=1e-4)
    g.add_argument("--min_lr", type=WEIGHT, default=1e-6, help="of the cosine")
    g.add_argument("--optim", default="SGD", choices=OPTIMIZERS)
    g.add_argument("--momentum", type=number(float, 0, 0.9999), default=0.0, help="of SGD")
    g.add_argument("--weight_decay", type=WEIGHT, default=5e-4)
    g.add_argument("--weight_decay_on", default="all", choices=DECAY)
    g.add_argument("--lr_scheduler", default="cosine", choices=SCHEDULERS)
    g.add_argument("--cosine", default="original", choices=COSINES, help="also of the warm-up")
    g.add_argument("--step_size", default="20", help="epochs; 10,20,30 for multistep")
    g.add_argument("--gamma", type=number(float, 0, 1, open_low=True), default=0.5)
    g.add_argument("--clip_grad", type=WEIGHT, default=0.0, help="0 = off")
    g.add_argument("--amp", default="fp32", choices=("fp32", "bf16", "fp16"))
    g.add_argument("--grad_checkpointing", action="store_true", help="less memory, more time")
    g.add_argument("--channels_last", action="store_true")
    g.add_argument("--log_interval", type=SIZE, default=50, help="steps between lines of progress")
    g.add_argument("--eval_interval", type=SIZE, default=1, help="epochs between validations")
    g.add_argument("--save_every", type=COUNT, default=0, help="steps between saved states too")
    g.add_argument("--save_all", action="store_true", help="max_acc.pth holds head and teacher too")

    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="TLD", help="the name that folders and records bear")
    g.add_argument("--data_path", type=Path, help="folder: class/image or coarse/fine/image")
    g.add_argument("--layout", default="auto", choices=LAYOUTS)
    g.add_argument("--calibration_share", type=number(float, 0.01, 0.5), default=0.1)
    g.add_argument("--test_share", type=FRACTION, default=0.25, help="of classes, in whole groups")
    g.add_argument("--validation_share", type=FRACTION, default=0.0, help="likewise, for tuning")
    g.add_argument("--test_groups", type=_names, default=(), help="a,b: instead of a share")
    g.add_argument("--validation_groups", type=_names, default=())
    g.add_argument("--split_file", type=Path, help="a split.json that another run made")
    g.add_argument("--split_seed", type=COUNT, default=0)
    g.add_argument("--train_list", type=Path, nargs="+", default=[], help="path, remark, label")
    g.add_argument("--train_root", type=Path, nargs="+", default=[], help="a folder for each list")
    g.add_argument("--remap", type=Path, help="label -> final label, .json or a torch file")
    g.add_argument("--val_list", type=Path)
    g.add_argument("--val_root", type=Path)
    g.add_argument("--test_list", type=Path)
    g.add_argument("--test_root", type=Path)
    g.add_argument("--coarse_mask", type=Path, help="truth of --test_list: pairs or labels, .npy")
    g.add_argument("--fine_mask", type=Path, help="likewise (default: the list's labels)")
    g.add_argument(
        "--test_part", default="test", choices=("test", "validation"), help="of a folder's classes"
    )
    g.add_argument("--builtin_classes", type=number(int, 4, 45), default=12)
    g.add_argument("--builtin_images", type=SIZE, default=40, help="a class")
    g.add_argument("--augment", action="store_true", help="random crops, flips, lighting noise")
    g.add_argument("--crop_scale", type=FRACTION, nargs=2, default=(0.08, 1.0))
    g.add_argument("--hflip", type=FRACTION, default=0.5)
    g.add_argument("--lighting", type=WEIGHT, default=0.1, help="deviation, 0 = off")
    g.add_argument("--lighting_order", default="right", choices=LIGHTING_ORDERS)
    g.add_argument("--bgr", action="store_true", help="blue first, as the original's networks")
    g.add_argument("--views", type=COUNT, default=0, help="views an image has; 0 = one an epoch")
    g.add_argument("--view_seed", type=COUNT, help="of the augmentation (default: --seed)")
    g.add_argument("--num_workers", type=COUNT, default=4, help="decoding threads")
    g.add_argument("--resize", default="linear", choices=("linear", "area", "cubic", "reduced"))
    return p
