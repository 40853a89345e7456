"""From a command line to a run's configuration: recipe, data set, and options that must agree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfnet_dynn.choices import ALL, LEARNED_RULES, LITE_ARCHS, PYRAMID_ARCHS, SETS, STORED
from gfnet_dynn.options import BACKBONE, BUILTIN, LEARNING, NETWORK, SIZES, STUDENT, build_parser
from gfnet_dynn.recipes import RECIPES
from gfnet_dynn.settings import is_model_file
from shared_core import datasets
from shared_core.datasets.views.randaugment import RandAugment
from shared_core.runs import UsageError
from shared_core.runs.opening import Start
from shared_core.runs.options import choose_scale, options_given, start_of
from shared_core.weights.catalogue import ALIASES
from shared_core.weights.efficientnet_lite import block_plan

PYRAMID_SIDE = 32  # pixels: patches of 4, and a grid that halves three times
# Options that are no part of a run's configuration.
OF_THE_COMMAND = ("output", "resume", "go_on", "fresh", "stage", "use_mlflow")


@dataclass(frozen=True)
class Command:
    """What was asked for.

    Attributes:
        values: the run's configuration, by option.
        threads: of the recipe, where the command says none.
        judged: the model file that ``--eval`` names; None judges the run's own.
    """

    values: dict[str, Any]
    output: Path
    start: Start
    stage: str
    judged: Path | None
    device: str
    threads: int | None
    use_mlflow: bool

    @property
    def only_evaluate(self) -> bool:
        """Whether a finished model is judged, anew if need be."""
        return self.stage == "evaluate"


def parse(argv: Sequence[str] | None, *, prog: str, scale: str | None) -> Command:
    """Parse, choose the recipe, and check what one option says of another.

    Args:
        argv: the words, or None for the command's own.
        prog: the script's name for the usage line.
        scale: the recipe when ``--scale`` is not given; None = the options' own defaults.

    Raises:
        UsageError: options that contradict each other.
    """
    parser = build_parser(prog)
    first = parser.parse_args(argv)
    asked = first.scale or scale
    chosen = choose_scale(asked, found=asked == "auto" and bool(locate(first))) if asked else None
    if chosen:
        parser.set_defaults(**RECIPES[chosen])
    args = parser.parse_args(argv)
    given = options_given(parser, argv)
    args.scale = chosen or "full"
    args.data_set = canonical(first.data_set, first.data_path)
    if args.data_path is None and args.scale != "rehearsal":
        args.data_path = datasets.require(args.data_root, datasets.get(args.data_set))
    if args.data_path is not None:
        locate(args)
    if isinstance(args.resume, str):
        args.checkpoint, args.resume = Path(args.resume), False
    args.pretrained = _file_or_none(args.pretrained)
    _settle_teacher(args, given)
    _check_files(args)
    _check_agreement(args)
    _check_exits(args)
    _check_effects(args, given)
    return _command(args, given)


def _command(args: argparse.Namespace, given: set[str]) -> Command:
    start = start_of(args)
    if start == "new" and args.stage != "all":  # stage after stage, or an evaluation of its own
        start = "continue"
    if args.policy is None:
        args.policy = "gate" if args.gate == "unc" else "max_prob"
    if args.output is None:
        args.output = Path("runs") / "gfnet_dynn" / f"{args.data_set.lower()}-{args.scale}"
    values = {name: value for name, value in vars(args).items() if name not in OF_THE_COMMAND}
    judged = values["checkpoint"] if args.stage == "evaluate" else None
    if judged is not None:
        values["checkpoint"] = None
    recipe_threads = args.threads
    if "threads" not in given:  # a run's own number comes before the recipe's
        values["threads"] = None
    return Command(
        values=values,
        output=args.output,
        start=start,
        stage=args.stage,
        judged=judged,
        device=args.device,
        threads=recipe_threads,
        use_mlflow=args.use_mlflow,
    )


def _file_or_none(text: str | Path | None) -> Path | None:
    return None if text is None or str(text) == "none" else Path(text)


def _settle_teacher(args: argparse.Namespace, given: set[str]) -> None:
    """A recipe's teacher gives way to a GFNet that was asked for; a name must be a network's.

    Raises:
        UsageError: no such network, or one whose weights are not here.
    """
    own = args.no_distil or given & {"backbone_arch", "backbone_dim"}
    if args.teacher == "none" or (own and args.teacher and "teacher" not in given):
        args.teacher = None
        for name in ("epochs", "lr"):  # the recipe's are those of fine-tuning
            if f"backbone_{name}" not in given and args.backbone_arch not in LITE_ARCHS:
                setattr(args, f"backbone_{name}", getattr(args, f"student_{name}"))
    name = args.teacher
    if args.backbone_arch in LITE_ARCHS:
        name = name or args.backbone_arch
        if args.no_distil and "exits" not in given:
            args.exits = lite_stage_ends(args.backbone_arch)
    if name is None or is_model_file(name):
        return
    from shared_core.for_torch.networks import find_network
    from shared_core.weights.catalogue import entry
    from shared_core.weights.finding import TRAINED, find_weights, how_to_get

    try:
        found = find_network(name)
    except ValueError as error:
        raise UsageError(f"--teacher: there is no such file, and {error}") from None
    if args.pretrained is None and found.library == "core":
        if find_weights(TRAINED, architecture=found.name) is None:
            how = how_to_get(entry(found.name))
            raise UsageError(f"{name}: get its trained weights by {how}")


def lite_stage_ends(arch: str) -> tuple[int, ...]:
    """The last blocks of an EfficientNet-lite's fourth, fifth and sixth stage."""
    plan = block_plan(ALIASES[arch])
    return tuple(plan[stage][-1].index for stage in (3, 4, 5))


def _check_files(args: argparse.Namespace) -> None:
    """What is named must be there."""
    for flag, path in (
        ("--checkpoint-path", args.checkpoint),
        ("--init", args.pretrained),
        ("--student-init", args.student_init),
        ("--teacher", args.teacher if args.teacher and is_model_file(args.teacher) else None),
        ("--split", args.split),
        ("--quarantine", args.quarantine),
    ):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"{flag} {path}: there is no such file")


def _check_agreement(args: argparse.Namespace) -> None:
    """Refuse now what would end the run later."""
    low, high = args.crop_scale
    if not 0 < low <= high:
        raise UsageError(f"--crop-scale {low:g} {high:g}: expected 0 < low <= high <= 1")
    if args.aa != "none":
        try:
            RandAugment(args.aa)
        except ValueError as error:
            raise UsageError(f"--aa {args.aa}: {error}") from None
    if args.max_warmup_epoch >= args.num_epoch:
        raise UsageError(
            f"--max_warmup_epoch {args.max_warmup_epoch} leaves nothing of --num_epoch "
            f"{args.num_epoch} for the gates: expected fewer"
        )
    if args.phase2 == "backbone" and not args.max_warmup_epoch:
        raise UsageError(
            "--phase2 backbone keeps the heads as the warm-up leaves them: expected "
            "--max_warmup_epoch of 1 or more"
        )
    if args.gate == "identity" and args.policy in LEARNED_RULES:
        raise UsageError(
            f"--policy {args.policy} asks learned gates, --gate identity has none: "
            "expected another policy"
        )
    if args.backbone_arch in PYRAMID_ARCHS and args.no_distil:
        raise UsageError(
            f"--no-distil: exits cannot sit on {args.backbone_arch}, whose grid shrinks from "
            "stage to stage; expected a student, or another --backbone-arch"
        )
    if args.answers == STORED and not args.no_distil:
        live = ("nd_weight", "spectrum_weight", "mixup", "cutmix")
        if used := [name for name in live if getattr(args, name)]:
            flag = f"--{used[0].replace('_', '-')}"
            raise UsageError(
                f"{flag} {getattr(args, used[0]):g} needs a teacher that is asked live: expected 0 "
                "with --answers stored"
            )
    if not args.no_distil and not (args.label_weight or args.kd_weight or args.nd_weight):
        raise UsageError(
            "--label-weight 0 and --kd-weight 0 leave the student nothing to learn: expected one "
            "of them above 0"
        )
    if args.backbone_arch in PYRAMID_ARCHS and args.spectrum_weight:
        raise UsageError(
            f"--spectrum-weight compares tokens of one grid, {args.backbone_arch} has four: "
            "expected 0"
        )
    pyramid = args.backbone_arch in PYRAMID_ARCHS and args.teacher is None
    least = max(args.patch_size, PYRAMID_SIDE if pyramid else 0)
    if args.input_size is not None and args.input_size < least:
        raise UsageError(
            f"--input-size {args.input_size} is less than the networks can cut into patches: "
            f"expected {least} or more"
        )


def _check_exits(args: argparse.Namespace) -> None:
    """Exits that the network has no block for."""
    if args.checkpoint is not None or args.exits == ALL:  # a model file's own depth counts
        return
    from gfnet_dynn.models.gfnet import ISOTROPIC

    arch = args.backbone_arch if args.no_distil else args.student_arch
    if arch in LITE_ARCHS:
        depth = block_plan(ALIASES[arch])[-1][-1].count + 1
    else:
        depth = args.depth or ISOTROPIC[arch][1]
    exits = list(args.exits)
    if depth < 2 or exits != sorted(set(exits)) or any(not 0 <= e < depth - 1 for e in exits):
        raise UsageError(
            f"--exits {','.join(map(str, exits))}: expected rising block numbers from 0 "
            f"to {depth - 2}, the network has {depth} blocks and the last has the final head"
        )


def _check_effects(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse options that would be ignored.

    Args:
        given: names of the options that were on the command line.
    """
    own_parts = (
        bool(given & {"split_ratio", "drop_leaks", "group_by"})
        and args.data_path is not None
        and datasets.scan(args.data_path).layout == "split"
    )
    file, judged = args.checkpoint is not None, args.stage == "evaluate"
    taken = args.teacher is not None and is_model_file(args.teacher)
    for without, names, reason in (
        (
            own_parts,
            ("split_ratio", "group_by"),
            f"{args.data_path} is split into folders already",
        ),
        (args.split is not None, ("split_ratio", "split_seed", "group_by"), "--split decides"),
        (not own_parts, ("drop_leaks",), "no folders of parts are given"),
        (args.data_path is not None, BUILTIN, f"the images of {args.data_path} are used"),
        (args.aa != "none", ("color_jitter",), f"as in timm, --aa {args.aa} takes its place"),
        (args.no_distil, STUDENT, "--no-distil leaves the student out"),
        (taken, BACKBONE, "--teacher takes the backbone's place"),
        (args.teacher is not None, SIZES, "--teacher takes the backbone's place"),
        (
            args.pretrained is None and args.student_init is None,
            ("resolution_transfer",),
            "there is no --init or --student-init file",
        ),
        (file, ("pretrained",), "--checkpoint-path takes its place"),
        (not args.kd_weight, ("kd_temperature", "kd_warmup"), "--kd-weight is 0"),
        (not args.reprob, ("remode", "recount"), "--reprob is 0"),
        (not args.max_warmup_epoch, ("patience",), "there is no warm-up"),
        (
            args.gate == "identity",
            ("gate_lr", "bilevel_batch_count"),
            "--gate identity has nothing to learn",
        ),
        (args.phase2 == "joint", ("bilevel_batch_count",), "--phase2 joint takes no turns"),
        (
            args.backbone_arch in (*PYRAMID_ARCHS, *LITE_ARCHS),
            ("backbone_dim",),
            f"the widths of {args.backbone_arch} are its own",
        ),
        (not args.deep_supervision, ("deep_kd", "deep_temperature"), "--deep-supervision is 0"),
        (file, NETWORK, "the network is that of --checkpoint-path"),
        (
            file and not judged,
            LEARNING,
            "--checkpoint-path leaves no network below the exits to train",
        ),
    ):
        for name in names:
            if without and name in given:
                raise UsageError(f"--{name.replace('_', '-')} would have no effect: {reason}")


def canonical(data_set: str | None, data_path: Path | None) -> str:
    """The data set's name as checkpoints spell it: one of ``SETS``, or the folder's own name."""
    if data_set is None:
        return (data_path.resolve().name or "images") if data_path else "AID"
    for name in SETS:
        if data_set.lower() == name.lower():
            return name
    if not data_set.strip(" .") or any(c in data_set for c in "/\\\0"):
        raise UsageError(f"--data-set {data_set!r}: expected a name that a file may bear")
    if data_path is None:
        raise UsageError(
            f"unknown --data-set {data_set!r}: expected one of {', '.join(SETS)}, "
            "or any name together with --data-path"
        )
    return data_set


def locate(args: argparse.Namespace) -> Path | None:
    """The data set's folder: ``--data-path``, or what is found under ``--data-root``.

    Raises:
        FileNotFoundError: ``--data-path`` is not a folder.
    """
    if args.data_path is not None:
        if not args.data_path.is_dir():
            raise FileNotFoundError(
                f"--data-path {args.data_path} is not a folder: expected class folders in it"
            )
        return Path(args.data_path)
    return datasets.find(args.data_root, datasets.get(canonical(args.data_set, None)))
