"""Export the student alone as a model folder: ONNX and a torch program, maybe int8."""

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

from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import FRACTION, number
from shared_core.runs.options import CommandParser, add_common


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="export_model.py",
        description="Write a student without teacher and head as a model folder. embed.py, "
        "search.py and `smallvision predict`, `evaluate` and `serve` take the folder.",
        epilog="Files: model.onnx and model.pt2 (torch.export.load), uint8 images in, unit-length "
        "features out; with --int8 model.int8.onnx; model.json, and README.md, the model card. "
        "Every file is asked all images of the test. "
        "Needs: pip install './packages/landmark_distill[export]'",
    )
    one = p.add_argument
    one("model", type=Path, metavar="MODEL", help="max_acc.pth, or another file of this project.")
    one("output", type=Path, metavar="OUTPUT_FOLDER",
        help="A new or empty folder, or an earlier export, which is replaced.")  # fmt: skip
    one("--format", choices=("onnx", "program", "both"), default="both",
        help="Which files to write.")  # fmt: skip
    one("--opset", type=number(int, 18, 99), metavar="N",
        help="The version of ONNX's operators, 18 or more. Without it torch's.")  # fmt: skip
    one("--int8", nargs="?", const="auto", default="no", choices=("no", "auto", "yes"),
        help="Also write an int8 file. auto, which --int8 alone means, keeps it where it is faster "
        "here and accurate enough; yes where it is accurate enough.")  # fmt: skip
    one("--max-accuracy-loss", type=FRACTION, default=0.01, metavar="X",
        help="What int8 may lose: of recall@1 where enough images of a class judge, else of the "
        "mean cosine to the float features. Layers go back to float until it holds.")  # fmt: skip
    one("--calibration", type=Path, metavar="DIR",
        help="Images like those that will come, for --int8: every second one fixes its ranges, the "
        "others judge it. Without it the calibration part of the file's run.")  # fmt: skip
    one("--most", type=number(int, 4, 10**9), default=1000, metavar="N",
        help="The calibration images to use.")  # fmt: skip
    one("--class-means", type=Path, metavar="FOLDER|SPLIT",
        help="Write a classifier: behind the features the mean directions of the classes of this "
        "folder, or of a split's training part, and a temperature that calibration images fit "
        "(every fifth image of a folder). The split's test part judges.")  # fmt: skip
    add_common(
        p,
        ("data-path",),
        help={"data-path": "Where the images of the file's run lie now, if elsewhere."},
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, describe. Returns the exit code."""
    args = build_parser().parse_args(argv)
    with_onnx = args.format != "program"
    if args.opset is not None and not with_onnx:
        raise UsageError(f"--opset {args.opset}: expected an ONNX file to write")
    if args.calibration is not None and args.int8 == "no":
        raise UsageError("--calibration is for --int8: expected both")
    if args.int8 != "no" and not with_onnx:
        raise UsageError("--int8 makes an ONNX file: expected --format onnx or both")
    if args.class_means is not None:
        if args.format == "program" or args.calibration is not None:
            raise UsageError("--class-means writes ONNX, and its own images calibrate: expected no "
                             "--format program, no --calibration")  # fmt: skip
        if not args.class_means.exists():
            raise FileNotFoundError(f"--class-means {args.class_means}: there is no such thing")
    needed = ("onnx", "onnxscript", "onnxruntime") if with_onnx else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ImportError(
            f"{missing[0]} is not installed: expected it for an export; "
            "pip install './packages/landmark_distill[export]'"
        )
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see main.py
    from landmark_distill.model_folder import FORMATS, ExportOptions, export_model

    wanted = ExportOptions(
        formats=FORMATS if args.format == "both" else (args.format,),
        opset=args.opset,
        int8=args.int8,
        max_accuracy_loss=args.max_accuracy_loss,
        calibration=args.calibration,
        most=args.most,
        data_path=args.data_path,
        class_means=args.class_means,
    )
    for line in export_model(args.model, args.output, wanted):
        print(line)
    return 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
