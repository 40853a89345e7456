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
    add("model", type=Path, metavar="MODEL", help="A .pdparams file of this project, or the folder "
        "of a run that made one best_model.pdparams.")  # fmt: skip
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
        "the test part of the model's run is asked; where there is none, generated pictures are.",
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
        "of the calibration and judges. Without it the calibration part of the model's run is "
        "taken, or where there is none its training part.",
    )
    add("--data-path", type=Path, metavar="DIR", help="Where the images of the model's run are "
        "now (default: where they were).")  # fmt: skip
    add("--unsure", type=FRACTION, default=None, metavar="P", help="An image whose best "
        "probability is below P is answered `unknown` (default: every image gets a "
        "class).")  # fmt: skip
    add("--unsure-accuracy", type=FRACTION, default=None, metavar="SHARE", help="As --unsure, with "
        "the smallest P at which this share of the answered calibration images is "
        "right.")  # fmt: skip
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
    run, model = _run_of(args.model)
    if args.calibration is None and run is None:
        for name in ("int8", "unsure_accuracy"):
            if getattr(args, name) not in (None, "no"):
                raise UsageError(
                    f"--{name.replace('_', '-')} is fixed on images, and {args.model} lies in no "
                    "run's folder: expected --calibration FOLDER with it"
                )
    if args.int8 == "no" and args.calibration is not None and args.unsure_accuracy is None:
        raise UsageError("--calibration is about int8: expected --int8 with it")
    for name in ("int8_method", "max_accuracy_loss"):
        if getattr(args, name) is not None and args.int8 == "no":
            raise UsageError(f"--{name.replace('_', '-')} is about int8: expected --int8 with it")
    if args.unsure is not None and args.unsure_accuracy is not None:
        raise UsageError("--unsure and --unsure-accuracy: expected one of them")
    if args.data_path is not None and run is None:
        raise UsageError(f"--data-path would have no effect: {args.model} lies in no run's folder")
    for name in ("calibration", "accuracy", "data_path"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"--{name.replace('_', '-')} {folder} is not a folder")
    return ExportOptions(
        model=model,
        output=args.output,
        run=run,
        data_path=args.data_path,
        unsure=args.unsure,
        unsure_accuracy=args.unsure_accuracy,
        formats=tuple(name for name in FORMATS if name in args.format),
        categories=args.categories,
        opset=args.opset,
        int8=args.int8,
        max_accuracy_loss=0.01 if args.max_accuracy_loss is None else args.max_accuracy_loss,
        int8_method=args.int8_method or METHODS[0],
        calibration=args.calibration,
        accuracy=args.accuracy,
    )


def _run_of(model: Path) -> tuple[Path | None, Path]:
    """The folder of the run that made a model, None without one; and the model's file.

    Raises:
        UsageError: a folder that holds no single model.
    """
    run = model if model.is_dir() else model.resolve().parent.parent
    there = (run / "split.json").is_file() and (run / "config.json").is_file()
    if not model.is_dir():
        return run if there else None, model
    file = run / "models_saved" / "best_model.pdparams"
    if not there or not file.is_file():
        raise UsageError(
            f"{model} is no folder of a run with one best_model.pdparams in models_saved: expected "
            "such a one (main.py --n-splits 1, or --one-student), or a .pdparams file"
        )
    return run, file


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
    from shared_core.for_paddle.inference import import_paddle

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
