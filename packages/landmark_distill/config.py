"""From a command line to the options of a run: recipe first, then flags, then what must agree."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from landmark_distill.options import DISTILLING, build_parser
from landmark_distill.recipes import LANDMARK_CLASSES, RECIPES
from landmark_distill.schedules import Schedule, parse_milestones
from shared_core.runs import UsageError

LISTS = ("train_root", "remap", "val_list", "val_root", "test_root")
FOLDERS = (
    *("data_path", "layout", "calibration_share", "test_share", "validation_share"),
    *("test_groups", "validation_groups", "test_part", "split_file"),
)
BUILTIN = ("builtin_classes", "builtin_images")
VIEWS = ("crop_scale", "hflip", "lighting", "lighting_order")


def parse(argv: Sequence[str] | None, *, prog: str) -> argparse.Namespace:
    """Parse, apply ``--recipe``, and refuse what contradicts itself or would be ignored.

    Raises:
        UsageError: flags that contradict each other.
        FileNotFoundError: a file or folder that is named and not there.
    """
    parser = build_parser(prog)
    first = parser.parse_args(argv)
    if first.recipe:
        parser.set_defaults(**RECIPES[first.recipe])
    args = parser.parse_args(argv)
    unset = object()  # argparse leaves alone what the namespace holds already
    marks = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marks).items() if value is not unset}
    if args.test_only:  # nothing is taught, so a recipe's distillation falls away
        args.is_distill = "is_distill" in given
    if args.view_seed is None:
        args.view_seed = args.seed
    if args.recipe and args.train_list and args.num_classes is None:
        args.num_classes = LANDMARK_CLASSES
    args.data_kind = "list" if args.train_list or args.test_list else "folder"
    if args.data_kind == "folder" and args.data_path is None:
        args.data_kind = "builtin"
    _check_files(args)
    _check_data(args, given)
    _check_training(args, given)
    return args


def _check_files(args: argparse.Namespace) -> None:
    for flag in (
        *("init_weights", "teacher_init_weights", "remap", "val_list", "test_list"),
        *("coarse_mask", "fine_mask", "split_file"),
    ):
        path = getattr(args, flag)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{flag} {path}: there is no such file")
    for flag in ("data_path", "val_root", "test_root"):
        path = getattr(args, flag)
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"--{flag} {path}: there is no such folder")
    for path in args.train_root:
        if not path.is_dir():
            raise FileNotFoundError(f"--train_root {path}: there is no such folder")


def _refuse(given: set[str], names: Sequence[str], reason: str) -> None:
    for name in names:
        if name in given:
            raise UsageError(f"--{name} would have no effect: {reason}")


def _check_data(args: argparse.Namespace, given: set[str]) -> None:
    if not args.dataset.strip(" .") or any(c in args.dataset + args.suffix for c in "/\\\0"):
        raise UsageError(
            f"--dataset {args.dataset!r} --suffix {args.suffix!r}: expected names that a folder "
            "may bear"
        )
    if args.data_kind == "list":
        _refuse(given, (*FOLDERS, *BUILTIN), "the images come from lists")
        if len(args.train_root) != len(args.train_list):
            raise UsageError(
                f"{len(args.train_list)} --train_list with {len(args.train_root)} --train_root: "
                "expected a folder for each list"
            )
        for kind in ("val", "test"):
            if (getattr(args, f"{kind}_list") is None) != (getattr(args, f"{kind}_root") is None):
                raise UsageError(f"--{kind}_list and --{kind}_root: expected both or none")
        if not args.test_only and not (args.train_list and args.val_list):
            raise UsageError("training on lists needs --train_list and --val_list")
        if args.test_list is None:
            raise UsageError("--test_list is missing: expected the list of the open-set test")
    else:
        where = "the images come from a folder" if args.data_path else "the images are drawn"
        _refuse(given, (*LISTS, "coarse_mask", "fine_mask"), where)
        if args.data_kind == "folder":
            _refuse(given, BUILTIN, where)
        else:
            _refuse(given, ("layout",), where)
        if args.split_file is not None:
            decided = [name for name in FOLDERS[1:] if name not in ("test_part", "split_file")]
            _refuse(given, [*decided, "split_seed"], "--split_file decides")
        _refuse(
            given,
            [f"{kind}_share" for kind in ("test", "validation") if f"{kind}_groups" in given],
            "the groups are named",
        )
    low, high = args.crop_scale
    if not 0 < low <= high:
        raise UsageError(f"--crop_scale {low:g} {high:g}: expected 0 < low <= high <= 1")
    if not args.augment:
        _refuse(given, VIEWS, "--augment is not given, so every view is the whole image")
    if args.lighting_order == "original" and not args.bgr:
        raise UsageError("--lighting_order original differs for --bgr only: expected both")


def _check_training(args: argparse.Namespace, given: set[str]) -> None:
    if args.fresh and args.resume != "never":
        raise UsageError("--fresh starts anew, --resume goes on: expected one of them")
    if args.test_only:
        if args.init_weights is None:
            raise UsageError("--test_only needs --init_weights: the file to test")
        if args.resume == "always" or args.is_distill:
            raise UsageError("--test_only neither resumes nor distils: expected it without")
        return
    if not args.is_distill:
        _refuse(given, DISTILLING, "--is_distill is not given")
        if args.ce_weight == 0:
            raise UsageError("--ce_weight 0 without --is_distill leaves nothing to learn from")
    else:
        if not args.teacher_backbone_class:
            raise UsageError("--is_distill needs --teacher_backbone_class")
        if args.teacher_init_weights is None:
            raise UsageError("--is_distill needs --teacher_init_weights: the teacher's file")
        if args.ce_weight == 0 and args.kd_weight == 0:
            raise UsageError("--ce_weight 0 and --kd_weight 0 leave nothing to learn from")
        if args.kd_loss != "KD":
            _refuse(given, ("kd_temperature",), f"--kd_loss {args.kd_loss} has none")
        if args.kd_loss == "cosine":
            _refuse(given, ("kd_variant",), "--kd_loss cosine has one form")
        if args.knowledge is None:
            _refuse(given, ("knowledge_kind", "knowledge_top_k"), "--knowledge is not given")
        if args.knowledge_kind != "topk":
            _refuse(given, ("knowledge_top_k",), "--knowledge_kind is not topk")
        if args.knowledge is None and args.fill_knowledge:
            raise UsageError("--fill_knowledge needs --knowledge: the folder to fill")
        _check_knowledge(args)
        if not args.head_fixed:
            _refuse(given, ("mapped_head", "head_dtype"), "--head_fixed is not given")
    try:
        schedule_of(args)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.lr_scheduler == "cosine":
        _refuse(given, ("step_size", "gamma"), "--lr_scheduler is cosine")
    else:
        _refuse(given, ("min_lr",), f"--lr_scheduler is {args.lr_scheduler}")
    if args.optim != "SGD":
        _refuse(given, ("momentum",), f"--optim is {args.optim}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % world:
        raise UsageError(
            f"--batch_size {args.batch_size} for {world} processes: expected a multiple of them"
        )


def _check_knowledge(args: argparse.Namespace) -> None:
    if args.knowledge is None:
        return
    if args.knowledge_kind == "soft" and not (args.head_fixed and args.kd_loss == "KD"):
        raise UsageError(
            "--knowledge_kind soft holds what the shared head makes of the teacher: expected "
            "--head_fixed and --kd_loss KD, or another kind"
        )
    if args.knowledge_kind == "topk" and args.kd_loss != "KD":
        raise UsageError(
            f"--knowledge_kind topk holds logits, --kd_loss {args.kd_loss} compares features"
        )


def schedule_of(args: argparse.Namespace) -> Schedule:
    """The learning rate's schedule; ``ValueError`` when its numbers do not go together."""
    return Schedule(
        args.lr_scheduler,
        lr=args.lr,
        min_lr=args.min_lr,
        max_epoch=args.max_epoch,
        warmup=args.warmup_epoch,
        steps=parse_milestones(args.step_size),
        gamma=args.gamma,
        cosine=args.cosine,
    )


def plain(args: argparse.Namespace) -> dict[str, object]:
    """The options as JSON holds them."""

    def one(value: object) -> object:
        if isinstance(value, Path):
            return str(value)
        return [one(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: one(value) for name, value in vars(args).items()}
