"""From the words of a command line to the run they describe; what contradicts itself is refused."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from landmark_distill.config import (
    AUTO,
    BACKBONES,
    NONE,
    TRAINED,
    DataConfig,
    DistillConfig,
    DrawnScenes,
    HoldOut,
    ListFiles,
    NetworkConfig,
    RunConfig,
    TrainConfig,
    ViewConfig,
)
from landmark_distill.options import build_parser
from landmark_distill.recipes import LANDMARK_CLASSES, LITE0, PUBLISHED, recipe_values
from landmark_distill.schedules import Schedule, parse_milestones
from landmark_distill.utils import run_folder
from shared_core.runs.command import UsageError
from shared_core.runs.json_files import as_plain
from shared_core.runs.options import COMMON, options_given
from shared_core.weights.catalogue import ALIASES, names

T = TypeVar("T")
NETWORK = (
    *("window", "depths", "heads", "drop_path"),  # of a Swin
    *("drop_rate", "drop_block", "drop_block_steps"),  # of a Resnet12
    "width",  # of a Resnet20
)
# Options that have no effect without --is_distill.
DISTILLING = (
    *("teacher_backbone_class", "teacher_init_weights", "kd_loss", "kd_weight", "kd_variant"),
    *("kd_temperature", "head_fixed", "knowledge", "knowledge_kind", "knowledge_top_k"),
    *("mapped_head", "head_dtype", "fill_knowledge", "teacher_classes", "teacher_may_know_test"),
)
LISTS = ("train_root", "remap", "val_list", "val_root", "test_root")
FOLDERS = (
    *("data_path", "layout", "calibration_share", "test_share", "validation_share"),
    *("test_groups", "validation_groups", "test_part", "split"),
)
BUILTIN = ("builtin_classes", "builtin_images")
VIEWS = ("crop_scale", "hflip", "lighting", "lighting_order")


def parse(argv: Sequence[str] | None, *, prog: str) -> RunConfig:
    """Parse, apply ``--recipe``, and refuse what contradicts itself or would be ignored.

    With ``--test_only`` the file that is tested says what network it is of and what it sees.

    Raises:
        UsageError: options that contradict each other, or the file that is tested.
        FileNotFoundError: a file or folder that is named and not there.
    """
    parser = build_parser(prog)
    args, given = parser.parse_args(argv), options_given(parser, argv)
    ours = {"recipe", "backbone_class", "is_distill", "test_only", "train_list", "test_list"}
    if args.data_path is not None and not ours & given:
        args.recipe = LITE0
    taught = args.teacher_init_weights is not None
    for name, value in recipe_values(args.recipe, taught=taught).items():
        if name not in given:
            setattr(args, name, value)
    if args.test_only:  # nothing is taught, so a recipe's distillation falls away
        args.is_distill = "is_distill" in given
    if args.view_seed is None:
        args.view_seed = args.seed
    if args.recipe in PUBLISHED and args.train_list and args.num_classes is None:
        args.num_classes = LANDMARK_CLASSES
    args.threads = args.threads or None
    _check_files(args)
    _check_data(args, given)
    _check_training(args, given)
    network = _network(args)
    mean, std = _normalisation(args)
    views = _filled(ViewConfig, args, size="input_size", seed="view_seed", mean=mean, std=std)
    if args.test_only:
        network, views = _of_the_file(Path(args.init), network, views, args, given)
    data, distill, train = _data(args), _distill(args), _train(args)
    folder = args.output or run_folder(
        args.save_dir, args.suffix, network=network, views=views, data=data, distill=distill,
        train=train,
    )  # fmt: skip
    return RunConfig(
        folder=folder,
        start=_start(args),
        network=network,
        views=views,
        data=data,
        train=train,
        distill=distill,
        test_only=args.test_only,
        fill_knowledge=args.fill_knowledge,
        device=args.device,
        multi_gpu=args.multi_gpu,
        stored=as_plain(vars(args)),
    )


def _start(args: argparse.Namespace) -> Any:
    if args.fresh and (args.resume != "never" or args.go_on):
        raise UsageError("--fresh starts anew, --resume goes on: expected one of them")
    if args.resume == "always":
        return "resume"
    if args.resume == "auto" or args.go_on:
        return "continue"
    return "fresh" if args.fresh else "new"


def _filled(kind: type[T], args: argparse.Namespace, **named: Any) -> T:
    """A dataclass from the options.

    Args:
        named: by field, the option that it is called by elsewhere (a string), or its value.
    """
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        given = named.get(field.name, field.name)
        value = getattr(args, given) if isinstance(given, str) else given
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _network(args: argparse.Namespace) -> NetworkConfig:
    options = {name: getattr(args, name) for name in NETWORK}
    known = {name: value for name, value in options.items() if value is not None}
    return _filled(
        NetworkConfig, args, name="backbone_class", image_size="input_size", scale="cos_scale",
        margin="cos_margin", options=known,
    )  # fmt: skip


def _of_the_file(
    path: Path,
    network: NetworkConfig,
    views: ViewConfig,
    args: argparse.Namespace,
    given: set[str],
) -> tuple[NetworkConfig, ViewConfig]:
    """What the file to be tested says; a foreign file says nothing, so the options do."""
    from landmark_distill.model_files import check_channels, read_model

    _, facts = read_model(path)
    if facts is None:
        return network, views
    if "bgr" in given:
        check_channels(path, facts, bgr=args.bgr)
    found = NetworkConfig.of_file(facts["network"])
    said = {
        "backbone_class": found.name,
        "input_size": found.image_size,
        "feature_dim": found.feature_dim,
        "resize": str(facts["resize"]),
        **{name: found.options.get(name) for name in NETWORK},
    }
    for name, value in said.items():
        if name in given and getattr(args, name) != value:
            raise UsageError(
                f"{_flag(name)} {_shown(getattr(args, name))}: {path} says {_shown(value)}, "
                "expected that, or no such option"
            )
    sees = replace(
        views, size=found.image_size, bgr=facts["bgr"], resize=facts["resize"],
        mean=tuple(facts["mean"]), std=tuple(facts["std"]),
    )  # fmt: skip
    return found, sees


def _data(args: argparse.Namespace) -> DataConfig:
    lists = drawn = None
    if args.train_list or args.test_list:
        lists = ListFiles(
            train=tuple(zip(args.train_list, args.train_root, strict=True)),
            val=None if args.val_list is None else (args.val_list, args.val_root),
            test=(args.test_list, args.test_root),
            remap=args.remap,
            coarse=args.coarse_mask,
            fine=args.fine_mask,
        )
    elif args.data_path is None:
        pixels = max(args.input_size, 16)
        drawn = DrawnScenes(args.builtin_classes, args.builtin_images, pixels, args.split_seed)
    hold_out = _filled(
        HoldOut, args, test="test_share", validation="validation_share",
        calibration="calibration_share", seed="split_seed",
    )  # fmt: skip
    return _filled(
        DataConfig, args, name="dataset", learns=not args.test_only, lists=lists, path="data_path",
        drawn=drawn, hold_out=hold_out, split_file="split", threads="workers",
    )  # fmt: skip


def _distill(args: argparse.Namespace) -> DistillConfig | None:
    if not args.is_distill:
        return None
    return _filled(
        DistillConfig, args, backbone="teacher_backbone_class", weights="teacher_init_weights",
        loss="kd_loss", weight="kd_weight", variant="kd_variant", temperature="kd_temperature",
        store="knowledge", store_kind="knowledge_kind", top_k="knowledge_top_k",
        by_number=args.teacher_classes == "by-number", may_know_test="teacher_may_know_test",
    )  # fmt: skip


def _train(args: argparse.Namespace) -> TrainConfig:
    return _filled(
        TrainConfig, args, schedule=_schedule(args), optimizer="optim",
        momentum=args.momentum if args.optim == "SGD" else 0.0, decay_on="weight_decay_on",
        clip="clip_grad", checkpointing="grad_checkpointing",
    )  # fmt: skip


def _schedule(args: argparse.Namespace) -> Schedule:
    try:
        return Schedule(
            args.lr_scheduler,
            lr=args.lr,
            min_lr=args.min_lr,
            max_epoch=args.epochs,
            warmup=args.warmup_epoch,
            steps=parse_milestones(args.step_size),
            gamma=args.gamma,
            cosine=args.cosine,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


# -- what must agree ------------------------------------------------------------------------------


def _flag(name: str) -> str:
    """How an option is written: common ones with hyphens, the original's with underscores."""
    common = name.replace("_", "-")
    return f"--{common}" if common in COMMON else f"--{name}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _refuse(given: set[str], names: Sequence[str], reason: str) -> None:
    for name in names:
        if name in given:
            raise UsageError(f"{_flag(name)} would have no effect: {reason}")


def _normalisation(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the network is used to: that of its trained weights.

    Raises:
        UsageError: no such network, or options that it does not obey.
    """
    from landmark_distill.backbones import normalisation

    teacher = args.teacher_backbone_class if args.is_distill else None
    for name in filter(None, (args.backbone_class, teacher)):
        if name not in BACKBONES and args.bgr:
            raise UsageError(f"--bgr: {name} sees red first, expected it without")
    if args.backbone_class not in BACKBONES and args.grad_checkpointing:
        raise UsageError(f"--grad_checkpointing: {args.backbone_class} cannot, expected it without")
    try:
        return normalisation(args.backbone_class)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_files(args: argparse.Namespace) -> None:
    words = (AUTO, NONE, TRAINED, *names(), *ALIASES)
    if args.init not in words and not Path(args.init).is_file():
        raise FileNotFoundError(
            f"--init {args.init}: there is no such file; expected one, or one of {', '.join(words)}"
        )
    for name in (
        *("teacher_init_weights", "remap", "val_list", "test_list"),
        *("coarse_mask", "fine_mask", "split"),
    ):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{_flag(name)} {path}: there is no such file")
    folders = [("train_root", path) for path in args.train_root]
    folders += [(name, getattr(args, name)) for name in ("data_path", "val_root", "test_root")]
    for name, path in folders:
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"{_flag(name)} {path}: there is no such folder")


def _check_data(args: argparse.Namespace, given: set[str]) -> None:
    if not args.dataset.strip(" .") or any(c in args.dataset + args.suffix for c in "/\\\0"):
        raise UsageError(
            f"--dataset {args.dataset!r} --suffix {args.suffix!r}: expected names that a folder "
            "may bear"
        )
    if args.output is not None:
        _refuse(given, ("save_dir", "suffix"), "--output names the folder")
    if args.train_list or args.test_list:
        _check_lists(args, given)
    else:
        _check_folder(args, given)
    low, high = args.crop_scale
    if not 0 < low <= high:
        raise UsageError(f"--crop_scale {low:g} {high:g}: expected 0 < low <= high <= 1")
    if not args.augment:
        _refuse(given, VIEWS, "--augment is not given, so every view is the whole image")
    if args.lighting_order == "original" and not args.bgr:
        raise UsageError("--lighting_order original differs for --bgr only: expected both")


def _check_lists(args: argparse.Namespace, given: set[str]) -> None:
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


def _check_folder(args: argparse.Namespace, given: set[str]) -> None:
    where = "the images come from a folder" if args.data_path else "the images are drawn"
    _refuse(given, (*LISTS, "coarse_mask", "fine_mask"), where)
    _refuse(given, BUILTIN if args.data_path else ("layout",), where)
    if args.split is not None:
        decided = [name for name in FOLDERS[1:] if name not in ("test_part", "split")]
        _refuse(given, [*decided, "split_seed"], "--split decides")
    shares = [f"{kind}_share" for kind in ("test", "validation") if f"{kind}_groups" in given]
    _refuse(given, shares, "the groups are named")


def _check_training(args: argparse.Namespace, given: set[str]) -> None:
    _start(args)
    if args.test_only:
        if not Path(args.init).is_file():
            raise UsageError(f"--test_only needs --init FILE to test, got {args.init}")
        if args.resume == "always" or args.is_distill:
            raise UsageError("--test_only neither resumes nor distils: expected it without")
        return
    if args.is_distill:
        _check_distillation(args, given)
    else:
        _refuse(given, DISTILLING, "--is_distill is not given")
        if args.ce_weight == 0:
            raise UsageError("--ce_weight 0 without --is_distill leaves nothing to learn from")
    _schedule(args)
    if args.lr_scheduler == "cosine":
        _refuse(given, ("step_size", "gamma"), "--lr_scheduler is cosine")
    else:
        _refuse(given, ("min_lr",), f"--lr_scheduler is {args.lr_scheduler}")
    if args.init == NONE:
        trained = ("body_rate", "layer_decay", "freeze_body", "feature_start")
        _refuse(given, trained, "--init none has no trained body")
    if args.optim != "SGD":
        _refuse(given, ("momentum",), f"--optim is {args.optim}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % world:
        raise UsageError(
            f"--batch-size {args.batch_size} for {world} processes: expected a multiple of them"
        )


def _check_distillation(args: argparse.Namespace, given: set[str]) -> None:
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
    if args.knowledge_kind != "topk":
        _refuse(given, ("knowledge_top_k",), "--knowledge_kind is not topk")
    if not args.head_fixed:
        _refuse(given, ("mapped_head", "head_dtype"), "--head_fixed is not given")
    if args.knowledge is None:
        _refuse(given, ("knowledge_kind", "knowledge_top_k"), "--knowledge is not given")
        if args.fill_knowledge:
            raise UsageError("--fill_knowledge needs --knowledge: the folder to fill")
    elif args.knowledge_kind == "soft" and not (args.head_fixed and args.kd_loss == "KD"):
        raise UsageError(
            "--knowledge_kind soft holds what the shared head makes of the teacher: expected "
            "--head_fixed and --kd_loss KD, or another kind"
        )
    elif args.knowledge_kind == "topk" and args.kd_loss != "KD":
        raise UsageError(
            f"--knowledge_kind topk holds logits, --kd_loss {args.kd_loss} compares features"
        )
