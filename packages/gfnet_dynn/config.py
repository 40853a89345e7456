"""From a command line to the options of a run: recipe, data set, and flags that must agree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gfnet_dynn.options import BUILTIN, LEARNING, NETWORK, SETS, STUDENT, build_parser
from gfnet_dynn.recipes import RECIPES
from shared_core import datasets
from shared_core.datasets.views.randaugment import RandAugment
from shared_core.runs import UsageError


def parse(argv: Sequence[str] | None, *, prog: str, scale: str | None) -> argparse.Namespace:
    """Parse, choose the recipe, and check what one flag says of another.

    Args:
        argv: the words, or None for the command's own.
        prog: the script's name for the usage line.
        scale: the recipe when ``--scale`` is not given; None = the flags' own defaults.

    Raises:
        UsageError: flags that contradict each other.
    """
    parser = build_parser(prog)
    first = parser.parse_args(argv)
    chosen = first.scale or scale
    if chosen == "auto":
        chosen = "full" if locate(first) else "rehearsal"
    if chosen:
        parser.set_defaults(**RECIPES[chosen])
    args = parser.parse_args(argv)
    unset = object()  # argparse leaves alone what the namespace holds already
    marks = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marks).items() if value is not unset}
    args.threads_given = "threads" in given
    args.scale = chosen or "full"
    args.wanted_data = first.data_set or (str(first.data_path) if first.data_path else "AID")
    args.data_set = canonical(first.data_set, first.data_path)
    args.known_set = args.data_set in SETS
    if args.data_path is None and args.scale != "rehearsal":
        args.data_path = datasets.require(args.data_root, datasets.get(args.data_set))
    if args.data_path is not None:
        locate(args)
    if isinstance(args.resume, str):
        args.checkpoint, args.resume = Path(args.resume), False
    _check(args, given)
    if args.eval:
        args.stage = "evaluate"
    if args.policy is None:
        args.policy = "gate" if args.gate == "unc" else "max_prob"
    if args.output is None:
        args.output = Path("runs") / "gfnet_dynn" / f"{args.data_set.lower()}-{args.scale}"
    return args


def _check(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse now what would end the run later, and what would be ignored.

    Args:
        given: names of the options that were on the command line.
    """
    for flag, path in (
        ("--checkpoint-path", args.checkpoint),
        ("--pretrained", args.pretrained),
        ("--quarantine", args.quarantine),
    ):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{flag} {path}: there is no such file")
    low, high = args.crop_scale
    if not 0 < low <= high:
        raise UsageError(f"--crop-scale {low:g} {high:g}: expected 0 < low <= high <= 1")
    if args.aa != "none":
        try:
            RandAugment(args.aa)
        except ValueError as error:
            raise UsageError(f"--aa {args.aa}: {error}") from None
    if args.fresh and (args.resume or args.go_on):
        raise UsageError("--fresh starts anew, --resume goes on: expected one of them")
    if args.early_exit_warmup and args.max_warmup_epoch >= args.num_epoch:
        raise UsageError(
            f"--max_warmup_epoch {args.max_warmup_epoch} leaves nothing of --num_epoch "
            f"{args.num_epoch} for the gates: expected fewer"
        )
    if args.gate == "identity" and args.policy in ("gate", "jei"):
        raise UsageError(
            f"--policy {args.policy} asks learned gates, --gate identity has none: "
            "expected another policy"
        )
    lower = args.backbone_arch if args.no_distil else args.student_arch
    if args.arch == "GFNet-xs-dynn" and lower != "gfnet-xs":
        raise UsageError(f"--arch GFNet-xs-dynn stands on gfnet-xs, this run puts {lower} there")
    if args.input_size is not None and args.input_size < args.patch_size:
        raise UsageError(
            f"--input-size {args.input_size} is less than a patch: expected at least "
            f"--patch-size {args.patch_size}"
        )
    _check_exits(args)
    own_parts = (
        "split_ratio" in given
        and args.data_path is not None
        and datasets.scan(args.data_path).layout == "split"
    )
    for without, names, reason in (
        (own_parts, ("split_ratio",), f"{args.data_path} is split into folders already"),
        (args.data_path is not None, BUILTIN, f"the images of {args.data_path} are used"),
        (args.aa != "none", ("color_jitter",), f"as in timm, --aa {args.aa} takes its place"),
        (args.no_distil, STUDENT, "--no-distil leaves the student out"),
        (args.pretrained is None, ("resolution_transfer",), "there is no --pretrained file"),
        (args.checkpoint is not None, ("pretrained",), "--checkpoint-path takes its place"),
        (not args.kd_weight, ("kd_temperature", "kd_warmup"), "--kd-weight is 0"),
        (not args.reprob, ("remode", "recount"), "--reprob is 0"),
        (not args.early_exit_warmup, ("patience",), "--early_exit_warmup is false"),
        (
            args.gate == "identity",
            ("gate_lr", "bilevel_batch_count"),
            "--gate identity has nothing to learn",
        ),
        (args.phase2 == "joint", ("bilevel_batch_count",), "--phase2 joint takes no turns"),
        (
            not args.deep_supervision,
            ("deep_kd", "deep_temperature"),
            "--deep-supervision is 0",
        ),
        (args.checkpoint is not None, NETWORK, "the network is that of --checkpoint-path"),
        (
            args.checkpoint is not None and not args.eval,
            LEARNING,
            "--checkpoint-path leaves no network below the exits to train",
        ),
    ):
        for name in names:
            if without and name in given:
                raise UsageError(f"--{name.replace('_', '-')} would have no effect: {reason}")


def _check_exits(args: argparse.Namespace) -> None:
    """Exits that the network has no block for."""
    if args.checkpoint is not None:  # its own depth counts
        return
    from gfnet_dynn.models.gfnet import ISOTROPIC

    arch = args.backbone_arch if args.no_distil else args.student_arch
    depth = args.depth or ISOTROPIC[arch][1]
    exits = list(args.exits)
    if depth < 2 or exits != sorted(set(exits)) or any(not 0 <= e < depth - 1 for e in exits):
        raise UsageError(
            f"--exits {','.join(map(str, exits)) or 'all'}: expected rising block numbers from 0 "
            f"to {depth - 2}, the network has {depth} blocks and the last has the final head"
        )


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
