"""The options of gfnet_dynn: the original's flags, its README's aliases, and what it lacked.

Light on purpose: ``--help`` passes through here, and no framework does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfnet_dynn.choices import (
    ALL,
    ANSWERS,
    FILTERS,
    GATES,
    HEAD_LOSSES,
    ISOTROPIC_ARCHS,
    LITE_ARCHS,
    LIVE,
    OBJECTIVES,
    PHASE2,
    PYRAMID_ARCHS,
    RULES,
    SCALES,
    SETS,
    STAGES,
    TRANSFERS,
)
from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number
from shared_core.runs.options import PRECISIONS, CommandParser, add_common

# Flags that the original parsed and never read, or that stand for nothing here. They are refused:
# nothing is ignored.
REFUSED = {
    "--transfer-ratio": "no part of the method uses it",
    "--proj_dim": "the gates have no projection; see --gate",
    "--num_proj": "the gates have no projection; see --gate",
    "--inat-category": "iNaturalist is no data set of this project",
    "--repeated-aug": "repeated augmentation is not part of any recipe here",
    "--dist-eval": "evaluation runs in one process",
    "--resplit": "there is no augmentation split to leave unerased",
    "--pin-mem": "a GPU gets page-locked batches in any case",
}
# Names of whole models in the original's commands: the networks below their exits.
ARCH_ALIASES = {"gfnet-dynn": "gfnet-xs", "gfnet-xs-dynn": "gfnet-xs"}

# Options that act on what a run may not have.
BUILTIN = ("builtin_classes", "builtin_images")
DISTIL = (
    *("student_epochs", "student_lr", "label_weight", "kd_weight", "kd_temperature", "nd_weight"),
    *("spectrum_weight", "kd_warmup", "answers", "compare_labels"),
)
STUDENT = ("student_arch", "student_dim", "student_init", "teacher", *DISTIL)
SIZES = ("backbone_arch", "backbone_dim")
BACKBONE = ("backbone_arch", "backbone_dim", "backbone_epochs", "backbone_lr", "pretrained")
# What a model file brings along, and how the networks below the exits learn.
NETWORK = (
    *("backbone_arch", "backbone_dim", "student_arch", "student_dim", "student_init", "depth"),
    "patch_size",
)
LEARNING = (
    *("backbone_epochs", "backbone_lr", *DISTIL, "finetune_batch", "finetune_wd"),
    *("finetune_warmup", "clip_grad", "ema", "mixup", "cutmix", "smoothing", "drop_path"),
    *("deep_supervision", "deep_kd", "deep_temperature", "save_every", "teacher"),
)


class _Refuse(argparse.Action):
    """A flag of the original that stands for nothing here."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        parser.error(f"{option_string} had no effect in the original: {REFUSED[option_string]}")


class _WarmUp(argparse.Action):
    """``--early_exit_warmup false`` is ``--max_warmup_epoch 0``; ``true`` is the default."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        if not values:
            namespace.max_warmup_epoch = 0


def yes_no(text: str) -> bool:
    """``True``/``False`` as the original's command lines spell them."""
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")


def exit_blocks(text: str) -> tuple[int, ...] | str:
    """``3,5,7,9`` or ``all``; positions are checked against the depth by the model."""
    if text == ALL:
        return ALL
    try:
        return tuple(int(part) for part in re.split(r"[,\s]+", text.strip("[] ")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected block numbers, 3,5,7,9") from None


def arch(text: str) -> str:
    """A network's name; the original's names of models with exits mean what lies below them."""
    return ARCH_ALIASES.get(text.lower(), text.lower())


def build_parser(prog: str) -> CommandParser:
    """The parser of ``main.py`` and ``main_dynn.py``."""
    parser = CommandParser(
        prog=prog,
        description="GFNet for remote-sensing scenes: fine-tune, distil, learn early exits, "
        "evaluate with samples that really leave early.",
        epilog="Results go to --output: report.html, result.json, metrics.jsonl, checkpoint/.",
    )
    for add in (_run, _data, _views, _networks, _learning, _distillation, _exits, _judging):
        add(parser)
    for flag in REFUSED:
        parser.add_argument(
            flag, nargs="?", action=_Refuse, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _table(group: argparse._ArgumentGroup, rows: Sequence[tuple[str, Any, Any, str]]) -> None:
    """Options of one kind: flags (with commas), type or choices, default, sentence."""
    for flags, kind, default, text in rows:
        words = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        names = flags.split(", ")
        if kind is not SIZE and kind is not COUNT and not isinstance(kind, tuple):
            words["metavar"] = "FILE" if kind is Path else "X"
        elif not isinstance(kind, tuple):
            words["metavar"] = "N"
        group.add_argument(*names, default=default, help=text, **words)


def _run(parser: CommandParser) -> None:
    group = parser.add_argument_group("what to run")
    add_common(
        group,
        ("output", "continue", "fresh", "seed", "threads", "device", "amp", "scale"),
        defaults={"scale": None},
        help={
            "output": "The folder of the run (default: runs/gfnet_dynn/<set>-<scale>).",
            "scale": "The recipe: full is the published one, short teaches a student by a trained "
            "network within the hour on a CPU, finetune is the official GFNet's own for another "
            "data set, rehearsal runs on built-in images, auto is full where the data set is found "
            "and else a rehearsal. Options given beside it win. main.py's default is auto, "
            "main_dynn.py takes each option's own default.",
        },
        more={"amp": {"choices": (*PRECISIONS, "auto")}, "scale": {"choices": SCALES}},
    )
    group.add_argument(
        "--stage",
        default="all",
        choices=("all", *STAGES),
        help="Run one stage, on what the stages before it left in --output, or all of them. "
        "evaluate judges anew also where that was done before.",
    )
    group.add_argument(
        "--eval",
        dest="stage",
        action="store_const",
        const="evaluate",
        help="Only evaluate a finished model; the same as --stage evaluate.",
    )
    group.add_argument(
        "--resume",
        "-r",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="Go on with the run in --output, exactly where it stopped. With FILE the same as "
        "--checkpoint-path FILE.",
    )
    group.add_argument(
        "--checkpoint-path",
        dest="checkpoint",
        type=Path,
        metavar="FILE",
        help="A backbone to give exits to, or with --eval the model to judge.",
    )
    group.add_argument(
        "--barely_train", action="store_true", help="Stop every epoch after 21 batches."
    )
    group.add_argument(
        "--save-every",
        type=COUNT,
        default=0,
        metavar="N",
        help="Save the state of backbone and student after so many steps; 0 saves after every "
        "epoch, as the exits always do.",
    )
    group.add_argument(
        "--use_mlflow",
        type=yes_no,
        nargs="?",
        const=True,
        default=True,
        metavar="true|false",
        help="Send metrics to MLflow's store runs/mlflow.db where mlflow is installed.",
    )


def _data(parser: CommandParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-set",
        "--data_set",
        metavar="{" + ",".join(SETS) + "}",
        help="A published set, found by name under --data-root, or any name beside --data-path "
        "(default: AID).",
    )
    add_common(
        group,
        ("data-path", "split", "input-size", "workers"),
        defaults={"workers": 2},
        aliases={"input-size": ("--img_size",), "workers": ("--num_workers",)},
        help={
            "input-size": "The side in pixels of the square image that the network sees "
            "(default: the set's own)."
        },
        more={"workers": {"dest": "num_workers"}},
    )
    group.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="The folder in which published sets lie.",
    )
    _table(
        group,
        [
            ("--num_classes", SIZE, None, "The data must have so many classes."),
            (
                "--split_ratio, --split-ratio",
                number(float, 0.01, 0.98),
                0.8,
                "The share of the images to learn from; the rest is half calibration, half test.",
            ),
            ("--split-seed", COUNT, 0, "What decides which image lies in which split."),
            ("--builtin-classes", number(int, 2, 45), 10, "Classes of built-in scenes."),
            ("--builtin-images", SIZE, 200, "Built-in scenes a class."),
            ("--quarantine", Path, None, "A list of files to leave out."),
            (
                "--group-by",
                ("near", "exact"),
                None,
                "Copies that stay in one split: nearly the same pictures, or the same bytes "
                "(default: near).",
            ),
        ],
    )
    group.add_argument(
        "--drop-leaks",
        action="store_const",
        const=True,
        help="Of folders that are split already, learn from no image that lies in a later part.",
    )


def _views(parser: CommandParser) -> None:
    group = parser.add_argument_group("augmentation (training images)")
    _table(
        group,
        [
            ("--color-jitter", WEIGHT, 0.4, "Colour jitter; only with --aa none, as in timm."),
            ("--aa", str, "rand-m9-mstd0.5-inc1", "A RandAugment policy, or none."),
            (
                "--train-interpolation",
                ("bicubic", "bilinear"),
                "bicubic",
                "How images are resized, for evaluation too.",
            ),
            (
                "--crop-pct",
                number(float, 0.1, 1),
                0.875,
                "The share of the resized image that evaluation sees: 224 of 256 pixels.",
            ),
            ("--reprob", FRACTION, 0.0, "The probability of random erasing."),
            ("--remode", ("const", "rand", "pixel"), "pixel", "What erased parts are filled with."),
            ("--recount", SIZE, 1, "The most parts that are erased in an image."),
            ("--vflip", yes_no, False, "Flip upside down too, for views from above: true, false."),
            ("--mixup", WEIGHT, 0.8, "Mixup's alpha; 0 is off."),
            ("--cutmix", WEIGHT, 1.0, "CutMix's alpha; 0 is off."),
        ],
    )
    group.add_argument(
        "--crop-scale",
        type=FRACTION,
        nargs=2,
        default=(0.08, 1.0),
        metavar=("LOW", "HIGH"),
        help="The area of a random crop, as shares of the image.",
    )


def _networks(parser: CommandParser) -> None:
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--backbone-arch",
        "--arch",
        type=arch,
        default="gfnet-xs",
        choices=(*ISOTROPIC_ARCHS, *PYRAMID_ARCHS, *LITE_ARCHS),
        help="The network to train first. The pyramids (gfnet-h-...) can teach a student; exits "
        "need a row of blocks, as lite0, lite1, lite2 have, which start from ImageNet's weights.",
    )
    add_common(
        group,
        ("init",),
        aliases={"init": ("--pretrained",)},
        help={
            "init": "A file that the backbone starts from, of an official GFNet or of --teacher's "
            "network; its head is new. none trains a GFNet from nothing (default: none)."
        },
        more={"init": {"dest": "pretrained", "metavar": "FILE"}},
    )
    _table(
        group,
        [
            ("--backbone-dim", SIZE, None, "The backbone's width (default: the network's own)."),
            ("--student-arch", ISOTROPIC_ARCHS, "gfnet-xs", "The network that learns from it."),
            ("--student-dim", SIZE, 256, "The student's width."),
            ("--depth", SIZE, None, "Blocks of networks with one grid (default: their own)."),
            ("--patch-size", SIZE, 16, "The side of a patch in pixels; a pyramid's is always 4."),
            ("--drop-path", number(float, 0, 0.99), 0.0, "The rate of stochastic depth."),
            ("--filter", FILTERS, "auto", "How the global filter is computed; same output."),
            (
                "--resolution-transfer",
                TRANSFERS,
                "official",
                "How --init's filters get to another image size.",
            ),
            (
                "--student-init",
                Path,
                None,
                "An official GFNet file that the student starts from; its head is new.",
            ),
        ],
    )
    group.add_argument(
        "--teacher",
        metavar="FILE|lite0|timm:NAME|torchvision:NAME",
        help="What teaches the student in place of a GFNet that is trained here: a model file of "
        "this project as it is, or a trained network by name, which learns the classes first "
        "(lite0, lite1, lite2 need no network connection; none: a GFNet).",
    )
    group.add_argument(
        "--no-distil", action="store_true", help="Give the backbone itself exits, no student."
    )


def _learning(parser: CommandParser) -> None:
    group = parser.add_argument_group("backbone and student")
    _table(
        group,
        [
            ("--backbone-epochs", SIZE, 100, "Epochs of the backbone; short has its own."),
            ("--backbone-lr", POSITIVE, 1e-3, "The backbone's learning rate (AdamW, cosine)."),
            ("--student-epochs", SIZE, 100, "Epochs of the student; short has its own."),
            ("--student-lr", POSITIVE, 1e-3, "The student's learning rate (AdamW, cosine)."),
            ("--finetune-batch", SIZE, 64, "Images of a step, in each process."),
            ("--finetune-wd", WEIGHT, 0.05, "Weight decay."),
            ("--finetune-warmup", COUNT, 5, "Epochs in which the learning rate rises."),
            ("--clip-grad", WEIGHT, 1.0, "The largest 2-norm of a gradient; 0 is off."),
            ("--ema", number(float, 0, 0.99999), 0.0, "Decay of averaged weights; 0 is off."),
            ("--smoothing", number(float, 0, 0.99), 0.1, "Label smoothing."),
            (
                "--deep-supervision",
                WEIGHT,
                0.0,
                "The weight of losses at --exits while the network below them learns; 0 is off.",
            ),
            ("--deep-kd", WEIGHT, 1.0, "The share of the final head's answers in these losses."),
            ("--deep-temperature", POSITIVE, 3.0, "The temperature of these answers."),
        ],
    )


def _distillation(parser: CommandParser) -> None:
    group = parser.add_argument_group("distillation")
    _table(
        group,
        [
            (
                "--answers",
                ANSWERS,
                LIVE,
                "live asks the teacher every random view; stored asks it once for each turn and "
                "mirror image of an image (mirror images alone without --vflip true), and the "
                "student sees these.",
            ),
            ("--label-weight", WEIGHT, 1.0, "The weight of the labels in the student's loss."),
            ("--kd-weight", WEIGHT, 1.0, "The weight of the teacher's answers."),
            ("--kd-temperature", POSITIVE, 4.0, "The temperature of these answers."),
            ("--kd-warmup", SIZE, 1, "Epochs in which their weight rises."),
            ("--nd-weight", WEIGHT, 2.0, "The weight of norm and direction."),
            ("--spectrum-weight", WEIGHT, 0.0, "The weight of the tokens' spectra; 0 is off."),
            (
                "--compare-labels",
                yes_no,
                False,
                "Train the same student from the labels alone, too, and report whether "
                "distillation helped: true, false.",
            ),
        ],
    )


def _exits(parser: CommandParser) -> None:
    group = parser.add_argument_group("exits (the original's options)")
    add_common(
        group,
        ("epochs", "batch-size", "lr"),
        defaults={"epochs": 200, "batch-size": 64, "lr": 1e-3},
        aliases={"epochs": ("--num_epoch",), "batch-size": ("--batch",)},
        help={
            "epochs": "Epochs of the exits' training, warm-up included.",
            "batch-size": "Images of a step, in each process.",
            "lr": "The learning rate of heads and backbone (SGD, cosine).",
        },
        more={"epochs": {"dest": "num_epoch"}, "batch-size": {"dest": "batch"}},
    )
    group.add_argument(
        "--exits",
        type=exit_blocks,
        default=(3, 5, 7, 9),
        metavar="3,5,7,9",
        help="The blocks after which exits sit, counted from 0, or all (default: 3,5,7,9; of lite0 "
        "and its like the last blocks of three stages).",
    )
    _table(
        group,
        [
            (
                "--gate",
                GATES,
                "unc",
                "unc learns on four uncertainty features; identity takes the top probability, and "
                "learns nothing.",
            ),
            ("--gate-lr", POSITIVE, None, "The gates' learning rate (default: --lr)."),
            ("--wd", WEIGHT, 5e-4, "Weight decay."),
            ("--min-lr", WEIGHT, 2e-4, "Where the cosine ends."),
            ("--ce_ic_tradeoff", WEIGHT, 0.75, "lambda, the price of compute against the loss."),
            ("--max_warmup_epoch", COUNT, 10, "The most epochs of warm-up; 0 is none."),
            ("--patience", SIZE, 2, "Warm-up epochs without gain after which an exit is frozen."),
            ("--bilevel_batch_count", SIZE, 60, "Batches of one turn of gates or heads."),
            ("--gate_objective", OBJECTIVES, "ce", "The loss that gates weigh against cost."),
            ("--classifier_loss", HEAD_LOSSES, "boosted", "How samples weigh in the heads' loss."),
            (
                "--phase2",
                PHASE2,
                "exits",
                "After the warm-up: exits trains gates and heads in turns, backbone the backbone "
                "in place of the heads, joint all at once.",
            ),
        ],
    )
    group.add_argument(
        "--early_exit_warmup",
        type=yes_no,
        action=_WarmUp,
        default=argparse.SUPPRESS,
        metavar="true|false",
        help="false is another word for --max_warmup_epoch 0.",
    )


def _judging(parser: CommandParser) -> None:
    group = parser.add_argument_group("evaluation")
    _table(
        group,
        [
            (
                "--policy",
                RULES,
                None,
                "Who decides to leave (default: gate; max_prob with --gate identity).",
            ),
            (
                "--max-accuracy-loss",
                FRACTION,
                0.01,
                "What the recommended threshold may lose on calibration data.",
            ),
        ],
    )
