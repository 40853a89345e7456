"""The options of gfnet_dynn: the original's flags, its README's aliases, and what it lacked."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from gfnet_dynn.recipes import SCALES
from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number

STAGES = ("prepare", "backbone", "distil", "exits", "evaluate")
SETS = ("AID", "NaSC", "NWPU", "PatternNet", "UCM")
ARCHS = ("gfnet-ti", "gfnet-xs", "gfnet-s", "gfnet-b")

# Flags that the original parsed and never read. They are refused: nothing here is ignored.
REFUSED = {
    "--transfer-ratio": "no part of the method uses it",
    "--proj_dim": "the gates have no projection; see --gate",
    "--num_proj": "the gates have no projection; see --gate",
    "--inat-category": "iNaturalist is no data set of this project",
    "--repeated-aug": "repeated augmentation is not part of any recipe here",
    "--dist-eval": "evaluation runs in one process",
    "--resplit": "there is no augmentation split to leave unerased",
}


# Flags that act on what a run may not have.
BUILTIN = ("builtin_classes", "builtin_images")
DISTIL = (
    *("student_epochs", "student_lr", "kd_weight", "kd_temperature", "nd_weight"),
    *("spectrum_weight", "kd_warmup"),
)
STUDENT = ("student_arch", "student_dim", *DISTIL)
# What a model file brings along, and how the networks below the exits learn.
NETWORK = ("backbone_arch", "backbone_dim", "student_arch", "student_dim", "depth", "patch_size")
LEARNING = (
    *("backbone_epochs", "backbone_lr", *DISTIL, "finetune_batch", "finetune_wd"),
    *("finetune_warmup", "clip_grad", "ema", "mixup", "cutmix", "smoothing", "drop_path"),
    *("deep_supervision", "deep_kd", "deep_temperature", "save_every"),
)


class _Refuse(argparse.Action):
    """An option of the original that had no effect there."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        parser.error(f"{option_string} had no effect in the original: {REFUSED[option_string]}")


def _yes_no(text: str) -> bool:
    """``True``/``False`` as the original's command lines spell them."""
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")


def _exits(text: str) -> tuple[int, ...]:
    """``3,5,7,9`` or ``all``; positions are checked against the depth by the model."""
    if text == "all":
        return ()
    try:
        return tuple(int(part) for part in re.split(r"[,\s]+", text.strip("[] ")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected block numbers, 3,5,7,9") from None


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser with the original's flags, its README's aliases and what it lacked."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="GFNet for remote-sensing scenes: fine-tune, distil, learn early exits, "
        "evaluate with samples that really leave early.",
        epilog="Results go to --output: report.html, result.json, metrics.jsonl, checkpoint/.",
    )
    g = p.add_argument_group("what to run")
    g.add_argument("--stage", default="all", choices=("all", *STAGES), help="one stage, or all")
    g.add_argument(
        "--scale",
        choices=("auto", *SCALES),
        default=None,
        help="recipe: full = published, short = minutes on a CPU, rehearsal = built-in data; "
        "auto = full when the data set is found, else rehearsal. Flags given here win over it",
    )
    g.add_argument(
        "--output", type=Path, help="run folder (default: runs/gfnet_dynn/<set>-<scale>)"
    )
    g.add_argument(
        "--resume",
        "-r",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="go on with the run in --output; with FILE, start from that checkpoint",
    )
    g.add_argument(
        "--checkpoint-path",
        dest="checkpoint",
        type=Path,
        metavar="FILE",
        help="model for --eval, or a backbone to give exits to",
    )
    g.add_argument("--eval", action="store_true", help="only evaluate; needs a finished model")
    g.add_argument("--fresh", action="store_true", help="start anew, delete what --output holds")
    g.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="resume if --output holds an unfinished run, start if it holds none",
    )
    g.add_argument("--barely_train", action="store_true", help="stop epochs after 21 batches")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    g.add_argument(
        "--threads",
        type=COUNT,
        default=0,
        help="of the CPU that compute; 0 = torch's choice. A resumed run keeps the number it began "
        "with: another one rounds differently",
    )

    g = p.add_argument_group("data")
    g.add_argument(
        "--data-set",
        "--data_set",
        dest="data_set",
        default=None,
        type=str,
        metavar="{" + ",".join(SETS) + "}",
        help="or any name, with --data-path",
    )
    g.add_argument(
        "--data-path",
        type=Path,
        help="the data set's folder (class folders, or train/ val/ test/ with class folders)",
    )
    g.add_argument("--data-root", type=Path, default=Path("data"), help="folder of data sets")
    g.add_argument(
        "--input-size",
        "--img_size",
        dest="input_size",
        type=SIZE,
        help="pixels (default: the data set's own)",
    )
    g.add_argument("--num_classes", type=SIZE, help="checked against the data")
    g.add_argument(
        "--split_ratio",
        "--split-ratio",
        type=number(float, 0.01, 0.98),
        default=0.8,
        help="training share; the rest is half calibration, half test",
    )
    g.add_argument("--split-seed", type=COUNT, default=0)
    g.add_argument("--builtin-classes", type=number(int, 2, 45), default=10)
    g.add_argument("--builtin-images", type=SIZE, default=200, help="images per class")
    g.add_argument("--num_workers", type=COUNT, default=2, help="decoding threads")
    g.add_argument(
        "--pin-mem",
        action="store_true",
        help="page-locked batches for a GPU, which it gets in any case; refused on a CPU",
    )
    g.add_argument("--quarantine", type=Path, help="list of files to leave out")

    g = p.add_argument_group("augmentation (training images)")
    g.add_argument(
        "--color-jitter",
        type=WEIGHT,
        default=0.4,
        help="only with --aa none, as in timm",
    )
    g.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment policy, or none")
    g.add_argument("--train-interpolation", default="bicubic", choices=("bicubic", "bilinear"))
    g.add_argument(
        "--crop-pct",
        type=number(float, 0.1, 1),
        default=0.875,
        help="share of the resized image that evaluation sees (0.875 = 224 of 256)",
    )
    g.add_argument("--reprob", type=FRACTION, default=0.0, help="random erasing probability")
    g.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"))
    g.add_argument("--recount", type=SIZE, default=1)
    g.add_argument("--crop-scale", type=FRACTION, nargs=2, default=(0.08, 1.0))
    g.add_argument(
        "--vflip", type=_yes_no, default=False, help="vertical flips, for views from above"
    )
    g.add_argument("--smoothing", type=number(float, 0, 0.99), default=0.1)
    g.add_argument("--mixup", type=WEIGHT, default=0.8)
    g.add_argument("--cutmix", type=WEIGHT, default=1.0)

    g = p.add_argument_group("model")
    g.add_argument(
        "--arch",
        default="GFNet-Dynn",
        choices=("GFNet-Dynn", "GFNet-xs-dynn"),
        help="the model with exits; GFNet-xs-dynn insists on gfnet-xs under them",
    )
    g.add_argument("--backbone-arch", default="gfnet-xs", choices=ARCHS)
    g.add_argument("--backbone-dim", type=SIZE, help="width (default: the arch's)")
    g.add_argument("--student-arch", default="gfnet-xs", choices=ARCHS)
    g.add_argument("--student-dim", type=SIZE, default=256, help="width")
    g.add_argument("--depth", type=SIZE, help="blocks (default: the arch's)")
    g.add_argument("--patch-size", type=SIZE, default=16)
    g.add_argument("--drop-path", type=number(float, 0, 0.99), default=0.0)
    g.add_argument("--filter", default="auto", choices=("auto", "fft", "dft", "dft-dense"))
    g.add_argument("--pretrained", type=Path, help="official GFNet file for the backbone")
    g.add_argument("--resolution-transfer", default="official", choices=("official", "spectrum"))
    g.add_argument("--exits", type=_exits, default=(3, 5, 7, 9), help="3,5,7,9 or all")
    g.add_argument(
        "--gate",
        default="unc",
        choices=("unc", "identity"),
        help="unc: learned on four uncertainty features; identity: thresholds on the "
        "top probability, no gate is learned",
    )

    g = p.add_argument_group("backbone and distillation")
    for who in ("backbone", "student"):
        g.add_argument(f"--{who}-epochs", type=SIZE, default=100)
        g.add_argument(f"--{who}-lr", type=POSITIVE, default=1e-3, help="AdamW, cosine")
    g.add_argument("--finetune-batch", type=SIZE, default=64)
    g.add_argument("--finetune-wd", type=WEIGHT, default=0.05)
    g.add_argument("--finetune-warmup", type=COUNT, default=5, help="epochs of rising rate")
    g.add_argument("--clip-grad", type=WEIGHT, default=1.0, help="0 = off")
    g.add_argument("--ema", type=number(float, 0, 0.99999), default=0.0, help="decay, 0 = off")
    g.add_argument("--no-distil", action="store_true", help="give the backbone itself exits")
    g.add_argument("--kd-weight", type=WEIGHT, default=1.0)
    g.add_argument("--kd-temperature", type=POSITIVE, default=4.0)
    g.add_argument("--nd-weight", type=WEIGHT, default=2.0, help="norm and direction")
    g.add_argument("--spectrum-weight", type=WEIGHT, default=0.0)
    g.add_argument("--kd-warmup", type=SIZE, default=1, help="epochs of rising KD weight")
    g.add_argument(
        "--deep-supervision",
        type=WEIGHT,
        default=0.0,
        metavar="W",
        help="weight of losses at --exits while the network below the exits learns; 0 = off",
    )
    g.add_argument(
        "--deep-kd",
        type=WEIGHT,
        default=1.0,
        metavar="W",
        help="share of the final head's answers in these losses",
    )
    g.add_argument("--deep-temperature", type=POSITIVE, default=3.0, help="of these answers")

    g = p.add_argument_group("exits (the original's flags)")
    g.add_argument("--lr", type=POSITIVE, default=1e-3, help="SGD, cosine")
    g.add_argument("--gate-lr", type=POSITIVE, help="of the gates (default: --lr)")
    g.add_argument("--wd", type=WEIGHT, default=5e-4)
    g.add_argument("--min-lr", type=WEIGHT, default=2e-4)
    g.add_argument("--batch", type=SIZE, default=64)
    g.add_argument("--ce_ic_tradeoff", type=WEIGHT, default=0.75, help="lambda: price of compute")
    g.add_argument("--num_epoch", type=SIZE, default=200, help="warm-up included")
    g.add_argument("--max_warmup_epoch", type=COUNT, default=10)
    g.add_argument("--patience", type=SIZE, default=2, help="warm-up epochs without gain")
    g.add_argument("--early_exit_warmup", type=_yes_no, default=True)
    g.add_argument("--bilevel_batch_count", type=SIZE, default=60)
    g.add_argument("--gate_objective", default="ce", choices=("ce", "zeroOne", "prob"))
    g.add_argument(
        "--classifier_loss", default="boosted", choices=("single", "weighted", "boosted", "legacy")
    )
    g.add_argument("--phase2", default="exits", choices=("exits", "backbone", "joint"))

    g = p.add_argument_group("evaluation and records")
    g.add_argument(
        "--policy",
        default=None,
        choices=("gate", "jei", "max_prob", "entropy", "margin", "patience"),
        help="who decides to leave (default: gate; max_prob with --gate identity)",
    )
    g.add_argument(
        "--max-accuracy-loss",
        type=FRACTION,
        default=0.01,
        help="what the recommended threshold may lose on calibration data",
    )
    g.add_argument("--use_mlflow", type=_yes_no, nargs="?", const=True, default=True)
    g.add_argument("--amp", default="fp32", choices=("fp32", "bf16", "fp16", "auto"))
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    g.add_argument(
        "--save-every",
        type=COUNT,
        default=0,
        help="steps between saved states of backbone and student; 0 = after every epoch, "
        "as the exits always",
    )
    for flag in REFUSED:
        p.add_argument(
            flag, nargs="?", action=_Refuse, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return p
