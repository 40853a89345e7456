"""Write a finished model as a model folder for other runtimes; ``--help`` lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.deploy.options import add_exit_options, exit_options
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import FRACTION, number
from shared_core.runs.options import CommandParser, add_common


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="export_model.py",
        description="Write a finished model as ONNX: one file for a plain network, a chain of "
        "segments for one with exits. Every file is asked the whole test split of the model's run. "
        "predict.py and `smallvision predict`, `evaluate` and `serve` take the folder.",
        epilog="model.json beside the networks holds classes, views, exits, costs and thresholds; "
        "README.md is the model card. Needs: pip install 'gfnet_dynn[export]'",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="A .pth file of this project.")
    add(
        "output",
        type=Path,
        metavar="OUTPUT_FOLDER",
        help="A new or empty folder, or an earlier export, which is replaced.",
    )
    add_exit_options(parser, without=("no-exits",))
    add(
        "--int8",
        nargs="?",
        const="auto",
        default="no",
        choices=("no", "auto", "yes"),
        help="Also write int8 linear layers. auto, which --int8 alone means, keeps them where they "
        "are faster here and accurate enough; yes where they are accurate enough.",
    )
    add(
        "--max-accuracy-loss",
        type=FRACTION,
        default=0.01,
        metavar="X",
        help="What int8 may lose; layers go back to float until it holds.",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="Images like those that will come, which fix and judge the ranges of int8: in class "
        "folders by accuracy, else by agreement (default: the calibration split of the model's "
        "run).",
    )
    add_common(
        parser,
        ("data-path",),
        help={"data-path": "Where the images of the model's run lie now, if elsewhere."},
    )
    add(
        "--opset",
        type=number(int, 13, 99),
        metavar="N",
        help="The version of ONNX's operators, 13 or more (default: torch's).",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, describe. Returns the exit code."""
    args = build_parser().parse_args(argv)
    exits = exit_options(args)
    if args.model.is_dir():
        raise UsageError(f"{args.model} is a folder, expected a .pth file")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see main.py
    from gfnet_dynn.deploy.exporting import ExportOptions, export_model

    wanted = ExportOptions(
        exits, args.int8, args.max_accuracy_loss, args.calibration, args.data_path, args.opset
    )
    return export_model(args.model, args.output, wanted)


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
