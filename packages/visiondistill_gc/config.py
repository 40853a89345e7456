"""From a command line to the options of a run: recipe, data set, and flags that must agree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared_core import datasets
from shared_core.runs import UsageError
from visiondistill_gc.models.teacher_model import teacher_names
from visiondistill_gc.options import build_parser
from visiondistill_gc.recipes import RECIPES


def parse(argv: Sequence[str] | None, *, prog: str) -> argparse.Namespace:
    """Parse, choose the recipe, and check what one flag says of another.

    Raises:
        UsageError: flags that contradict each other.
        FileNotFoundError: a file or folder that is not there.
    """
    parser = build_parser(prog)
    first = parser.parse_args(argv)
    scale = first.scale or "auto"
    if scale == "auto":
        scale = "full" if first.data_path or _find(first.data_root, first.data_set) else "rehearsal"
    parser.set_defaults(**RECIPES[scale])
    args = parser.parse_args(argv)
    unset = object()  # argparse leaves alone what the namespace holds already
    marks = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marks).items() if value is not unset}
    args.scale = scale
    args.threads_given = "threads" in given
    if args.data_path is not None:
        if not args.data_path.is_dir():
            raise FileNotFoundError(
                f"--data-path {args.data_path} is not a folder: expected class folders in it"
            )
        if "data_set" not in given:
            args.data_set = args.data_path.resolve().name or "images"
    elif scale != "rehearsal":
        args.data_path = _require(args.data_root, args.data_set)
    if args.output is None:
        args.output = Path("runs") / "visiondistill_gc" / f"garbage-{scale}"
    _check(args, given, prog)
    return args


def _find(root: Path, name: str) -> Path | None:
    if name not in datasets.names():
        return None
    return datasets.find(root, datasets.get(name))


def _require(root: Path, name: str) -> Path:
    if name not in datasets.names():
        raise UsageError(
            f"--data-set {name}: expected one of {', '.join(datasets.names())}, or --data-path"
        )
    return datasets.require(root, datasets.get(name))


def _check(args: argparse.Namespace, given: set[str], prog: str) -> None:
    """Refuse now what would end the run later, and what would be ignored."""
    for flag in ("pretrained", "teacher_pretrained", "teacher_weights", "quarantine"):
        path = getattr(args, flag)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{flag.replace('_', '-')} {path}: there is no such file")
    if args.fresh and (args.resume or args.go_on):
        raise UsageError("--fresh starts anew, --resume goes on: expected one of them")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(
            f"--warmup-epochs {args.warmup_epochs} of --epochs {args.epochs}: expected fewer"
        )
    if args.folds is None:
        args.folds = list(range(args.n_splits))
    args.folds = sorted(set(args.folds))
    if args.folds[-1] >= args.n_splits:
        raise UsageError(
            f"--folds {args.folds[-1]}: expected 0 to {args.n_splits - 1}, there are "
            f"--n-splits {args.n_splits}"
        )
    low, high = args.crop_scale
    if not 0 < low <= high:
        raise UsageError(f"--crop-scale {low:g} {high:g}: expected 0 < low <= high <= 1")
    if args.jitter[3] > 0.5:
        raise UsageError(f"--jitter: the hue is {args.jitter[3]:g}, expected at most 0.5")
    if args.teacher_source == "paddle.vision" and args.teacher not in teacher_names():
        raise UsageError(f"--teacher {args.teacher}: expected one of {', '.join(teacher_names())}")
    if args.student_source == "paddleclas":
        wanted = {"frozen": 0, "head": "plain", "student_scale": 1.0}
        for name, value in wanted.items():
            if name in given and getattr(args, name) != value:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(args, name)}: expected {value}, a "
                    "network of paddleclas has no list of blocks and its own head and width"
                )
            setattr(args, name, value)
    if args.cache_size and not args.decoded_cache:
        raise UsageError("--cache-size would have no effect: expected --decoded-cache with it")
    if args.knowledge_seed and args.teacher_knowledge is None and prog == "main.py":
        raise UsageError("--knowledge-seed would have no effect: expected --teacher-knowledge")
    if args.teacher_knowledge is not None and not args.teacher_knowledge.is_dir():
        raise FileNotFoundError(f"--teacher-knowledge {args.teacher_knowledge}: no such folder")
    sources = ("teacher_weights", "teacher_knowledge", "teacher_pretrained")
    named = [s for s in sources if getattr(args, s) is not None]
    if args.alpha == 1 and named:
        raise UsageError(f"--{named[0].replace('_', '-')} would have no effect with --alpha 1")
    if len(named) > 1:
        flags = " and ".join("--" + s.replace("_", "-") for s in named)
        raise UsageError(f"{flags}: expected one source of teaching")
    untrained = not args.teacher_epochs and not named and args.alpha != 1
    if untrained and not args.allow_untrained_teacher:
        raise UsageError(
            "--teacher-epochs 0 without --teacher-weights or --teacher-knowledge leaves the "
            "teacher's head untrained: expected one of them, or --allow-untrained-teacher"
        )
    if "head" in given and args.head == "plain" and "hidden" in given:
        raise UsageError("--hidden would have no effect: --head plain has no hidden layer")
    if args.compare_seeds and args.alpha == 1:
        raise UsageError("--compare-seeds compares teachers: expected --alpha below 1")
    if args.compare_seeds and args.teacher_knowledge is not None:
        raise UsageError("--compare-seeds needs a teacher that runs, --teacher-knowledge is stored")
