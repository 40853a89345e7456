"""The options: every constant of the original is a flag with the original's value as default."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number
from visiondistill_gc.recipes import SCALES
from visiondistill_gc.utils.folds import KINDS
from visiondistill_gc.utils.precision import LEVELS
from visiondistill_gc.utils.schedule import KINDS as SCHEDULES
from visiondistill_gc.utils.teaching import ENGINES

SOURCES = ("paddle.vision", "paddleclas")
STAGES = ("prepare", "folds", "evaluate", "compare", "report")


_BELOW_ONE = number(float, 0, 0.99999)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Garbage classification: a trained teacher, K folds, a distilled student.",
        epilog="Results go to --output: report.html, result.json, metrics.jsonl, logs/ for "
        "VisualDL, models_saved/best_model_fold0.pdparams ...",
    )
    on_off = argparse.BooleanOptionalAction
    g = p.add_argument_group("what to run")
    g.add_argument(
        "--scale",
        choices=("auto", *SCALES),
        help="recipe: full = the README's, short = minutes on a CPU, rehearsal = built-in data; "
        "auto (default) = full when the data set is found, else rehearsal. Flags win over it",
    )
    g.add_argument("--stage", choices=("all", *STAGES), default="all", help="one stage, or all")
    g.add_argument("--folds", type=COUNT, nargs="+", help="only these of the folds (default: all)")
    g.add_argument("--output", type=Path, help="run folder (runs/visiondistill_gc/garbage-<scale>)")
    g.add_argument("--log-dir", type=Path, help="VisualDL logs (default: <output>/logs)")
    g.add_argument("--save-dir", type=Path, help="models (default: <output>/models_saved)")
    g.add_argument("--resume", action="store_true", help="go on with the run in --output")
    g.add_argument(
        "--continue", dest="go_on", action="store_true", help="resume if there is a run, else start"
    )
    g.add_argument("--fresh", action="store_true", help="start anew, delete what --output holds")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42)
    g.add_argument("--device", default="auto", help="auto, cpu, gpu, gpu:1")
    g.add_argument(
        "--threads",
        type=SIZE,
        default=1,
        help="of the CPU in a network's arithmetic; a resumed run keeps the number it began with",
    )

    g = p.add_argument_group("data")
    g.add_argument("--data-path", type=Path, help="folder of class folders (data/data101031)")
    g.add_argument("--data-root", type=Path, default=Path("data"), help="folder of data sets")
    g.add_argument("--data-set", default="garbage-4", help="name, to find it under --data-root")
    g.add_argument("--categories", nargs="+", help="class folders, checked against the data")
    g.add_argument("--num-classes", type=SIZE, help="checked against the data")
    g.add_argument("--input-size", type=SIZE, default=224, help="pixels")
    g.add_argument("--num-workers", type=COUNT, default=2, help="threads that decode")
    g.add_argument("--test-share", type=number(float, 0, 0.9), default=0.1, help="held out")
    g.add_argument("--split-seed", type=COUNT, default=42)
    g.add_argument("--quarantine", type=Path, help="list of files to leave out")
    g.add_argument("--decoded-cache", action=on_off, default=False, help="decode once, to disk")
    g.add_argument("--cache-size", type=COUNT, default=0, help="pixels of cached images; 0 = own")
    g.add_argument("--builtin-classes", type=number(int, 2, 45), default=4)
    g.add_argument("--builtin-images", type=SIZE, default=60, help="per class")

    g = p.add_argument_group("folds")
    g.add_argument("--n-splits", type=number(int, 2, 100), default=5)
    g.add_argument("--kfold", choices=KINDS, default="stratified")
    g.add_argument(
        "--group-by",
        choices=("near", "exact"),
        default="near",
        help="copies that stay on one side: of nearly the same picture, or of the same bytes",
    )
    g.add_argument(
        "--group-pattern", help="regular expression: equal matches in a name are a group"
    )

    g = p.add_argument_group("augmentation")
    g.add_argument("--hflip", type=FRACTION, default=0.5)
    g.add_argument("--vflip", type=FRACTION, default=0.3)
    g.add_argument("--rotation", type=number(float, 0, 180), default=30.0, help="degrees")
    g.add_argument("--crop-padding", type=COUNT, default=8, help="pixels")
    g.add_argument(
        "--jitter",
        type=WEIGHT,
        nargs=4,
        default=(0.3, 0.3, 0.3, 0.1),
        metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"),
    )
    g.add_argument("--erasing", type=FRACTION, default=0.2, help="probability")
    g.add_argument(
        "--crop-scale", type=FRACTION, nargs=2, default=(1.0, 1.0), help="area of a random crop"
    )
    g.add_argument("--mixup", type=WEIGHT, default=0.2, help="alpha of Beta; 0 = off")
    g.add_argument("--mixup-start", type=COUNT, default=5, help="first epoch with it")
    g.add_argument("--label-smoothing", type=_BELOW_ONE, default=0.0)

    g = p.add_argument_group("teacher")
    g.add_argument("--teacher", default="resnet50", help="any classifier of paddle.vision")
    g.add_argument("--teacher-source", choices=SOURCES, default="paddle.vision")
    g.add_argument("--teacher-pretrained", type=Path, help="weights for its layers below the head")
    g.add_argument("--teacher-weights", type=Path, help="a finished teacher; it is not trained")
    g.add_argument("--teacher-knowledge", type=Path, help="stored answers of a teacher")
    g.add_argument("--knowledge-seed", type=COUNT, default=0, help="of the views it was shown")
    g.add_argument("--teacher-epochs", type=COUNT, default=10, help="0 = its head stays untrained")
    g.add_argument("--teacher-lr", type=POSITIVE, default=1e-4)
    g.add_argument("--teacher-batch-size", type=SIZE, default=16)
    g.add_argument("--allow-untrained-teacher", action="store_true")
    g.add_argument("--teacher-engine", choices=ENGINES, default="auto")

    g = p.add_argument_group("student")
    g.add_argument("--student-source", choices=SOURCES, default="paddle.vision")
    g.add_argument("--student-scale", type=POSITIVE, default=1.0, help="width")
    g.add_argument("--head", choices=("improved", "plain"), default="improved")
    g.add_argument("--hidden", type=SIZE, default=1024, help="width of the improved head")
    g.add_argument("--dropout", type=_BELOW_ONE, default=0.5)
    g.add_argument("--frozen", type=number(int, 0, 19), default=14, help="blocks that do not learn")
    g.add_argument("--freeze-bn", action=on_off, default=True, help="nor their statistics")
    g.add_argument("--pretrained", type=Path, help="weights for its layers below the head")

    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=SIZE, default=50)
    g.add_argument("--batch-size", type=SIZE, default=16, help="of all processes together")
    g.add_argument("--base-lr", type=POSITIVE, default=1e-4)
    g.add_argument("--warmup-epochs", type=COUNT, default=5)
    g.add_argument("--schedule", choices=SCHEDULES, default="epoch", help="when the rate changes")
    g.add_argument("--optimizer", choices=("adam", "adamw"), default="adam")
    g.add_argument("--weight-decay", type=WEIGHT, default=1e-4)
    g.add_argument("--clip-grad", type=WEIGHT, default=0.0, help="0 = off")
    g.add_argument("--patience", type=COUNT, default=10, help="0 = never stop early")
    g.add_argument("--temperature", type=POSITIVE, default=4.0)
    g.add_argument("--alpha", type=FRACTION, default=0.5, help="weight of labels; 1 = no teacher")
    g.add_argument("--class-weights", choices=("balanced", "none"), default="balanced")
    g.add_argument("--ema", type=_BELOW_ONE, default=0.0, help="decay, 0 = off")
    g.add_argument("--amp", choices=LEVELS, default="O0", help="O1, O2: on a GPU")
    g.add_argument("--amp-dtype", choices=("fp16", "bf16"), default="fp16")
    g.add_argument("--save-every", type=COUNT, default=0, help="steps; 0 = after every epoch")

    g = p.add_argument_group("records")
    g.add_argument("--visualdl", action=on_off, default=True, help="log curves for VisualDL")
    g.add_argument("--floor", action=on_off, default=True, help="measure the floor of no network")
    g.add_argument(
        "--compare-seeds",
        type=COUNT,
        nargs="*",
        default=(),
        help="seeds of the comparison: distilled or not, Mixup or not, right or random teacher",
    )
    g.add_argument("--compare-epochs", type=SIZE, default=10)
    return p
