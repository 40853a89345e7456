"""Write a finished model as ONNX, for Paddle Inference, as int8; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import UsageError, run_command
from shared_core.runs.numbers import FRACTION
from shared_core.runs.options import CommandParser
from visiondistill_gc.options import ExportOptions

FORMATS = ("onnx", "paddle")
METHODS = ("minmax", "percentile", "entropy")
NEEDED = ("paddle2onnx", "onnx", "onnxruntime")  # for ONNX


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="export.py",
        description="Write a finished model as a folder that inference.py, serve.py and the "
        "smallvision command take: ONNX, Paddle Inference and int8, each checked against the model "
        "itself. Images go in as uint8, probabilities come out.",
        epilog="model.json beside the networks holds classes, preprocessing and what was measured; "
        "README.md is the model card. Needs: pip install 'visiondistill_gc[export]'",
    )
    add = p.add_argument
    add("model", type=Path, metavar="MODEL", help="A .pdparams file of this project.")
    add(
        "output",
        type=Path,
        metavar="OUTPUT_FOLDER",
        help="A new or empty folder, or an earlier export, which is replaced.",
    )
    add(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        help="What to write. onnx needs paddle2onnx, made for Python up to 3.12.",
    )
    add("--categories", nargs="+", metavar="NAME", help="The classes. They must be the model's.")
    add("--opset", type=int, default=17, metavar="N", help="The version of ONNX, 13 to 17.")
    add(
        "--accuracy",
        type=Path,
        metavar="FOLDER",
        help="Class folders of images that the model has not seen. Every file is asked all of "
        "them, and accuracy is measured; copies of calibration images are left out. Without it "
        "generated pictures are asked.",
    )
    add(
        "--int8",
        nargs="?",
        choices=("auto", "yes"),
        const="auto",
        default="no",
        help="Write an int8 ONNX file as well, its ranges fixed on --calibration images. It is "
        "kept if it is accurate enough and faster on this machine; yes keeps it when it is not "
        "faster here, for another device. One that is refused is an error.",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="Images like those that will come, labels not needed. Every second one is kept out "
        "of the calibration and judges.",
    )
    add(
        "--max-accuracy-loss",
        type=FRACTION,
        default=None,
        metavar="SHARE",
        help="How much accuracy (without labels: how many answers) int8 may change "
        "(default: 0.01).",
    )
    add("--int8-method", choices=METHODS, default=None,
        help="How ranges are found (default: minmax).")  # fmt: skip
    return p


def parse(argv: Sequence[str] | None) -> ExportOptions:
    """Parse, and refuse what cannot be done before anything is written.

    Raises:
        UsageError: words that do not fit together.
        ImportError: a package that ONNX needs.
        FileNotFoundError: a folder that is not there.
    """
    args = build_parser().parse_args(argv)
    if "onnx" in args.format:
        _check_packages()
    elif args.int8 != "no":
        raise UsageError("--int8 makes an ONNX file: expected --format onnx with it")
    if not 13 <= args.opset <= 17:
        raise UsageError(f"--opset {args.opset}: expected 13 to 17")
    if args.int8 != "no" and args.calibration is None:
        raise UsageError("--int8 fixes its ranges on images: expected --calibration FOLDER with it")
    for name in ("calibration", "int8_method", "max_accuracy_loss"):
        if getattr(args, name) is not None and args.int8 == "no":
            raise UsageError(f"--{name.replace('_', '-')} is about int8: expected --int8 with it")
    for name in ("calibration", "accuracy"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"--{name} {folder} is not a folder")
    if args.model.is_dir():
        raise UsageError(f"{args.model} is a folder, expected a .pdparams file")
    return ExportOptions(
        model=args.model,
        output=args.output,
        formats=tuple(name for name in FORMATS if name in args.format),
        categories=args.categories,
        opset=args.opset,
        int8=args.int8,
        max_accuracy_loss=0.01 if args.max_accuracy_loss is None else args.max_accuracy_loss,
        int8_method=args.int8_method or METHODS[0],
        calibration=args.calibration,
        accuracy=args.accuracy,
    )


def _check_packages() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing and sys.version_info >= (3, 13):
        raise UsageError(
            f"--format onnx: {missing[0]} is not installed, and Paddle2ONNX has no release for "
            f"Python {sys.version_info[0]}.{sys.version_info[1]}; expected 3.10 to 3.12, or "
            "--format paddle"
        )
    if missing:
        raise ImportError(
            f"{missing[0]} is not installed: expected it for --format onnx; "
            "pip install './packages/visiondistill_gc[export]'"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, describe. Returns the exit code: 1 when int8 was refused."""
    options = parse(argv)
    from visiondistill_gc.utils.paddle_inference import import_paddle

    import_paddle()  # once here, without its warning about a compiler cache
    from visiondistill_gc.deploy.exporting import export

    written = export(options)
    print("\n".join(written.lines))
    return 1 if written.int8 is not None and not written.int8.kept else 0


def cli() -> int:
    """The installed command; the settings come before the framework does."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait without spinning
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle warns about things nobody can change
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
