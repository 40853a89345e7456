"""Classify pictures, folders, a video or a webcam with a finished model; ``--help`` lists options.

python classifier.py jit_resnet18.pt photos/ --topk 3 --output labelled
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.deploy.options import (
    add_model_options,
    add_predict_options,
    model_options,
    predict_options,
)
from shared_core.runs import run_command
from shared_core.runs.options import CommandParser


def build_parser() -> CommandParser:
    """The command line: the core's options, and the first README's spellings of them."""
    parser = CommandParser(
        prog="classifier.py",
        description="Classify pictures with a model: a checkpoint of a training (.pth), what "
        "main.py --jit wrote (jit_ARCH.pt, ARCH.onnx), or a model folder. The most "
        "probable classes are printed, and drawn when --output or --show is given.",
    )
    add_model_options(parser, runtimes=("checkpoint", "torchscript"))
    add_predict_options(
        parser, aliases={"top": ("--topk",), "camera": ("--webcam",), "show-dir": ("--output",)}
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Classify. Returns the exit code, 1 when a picture could not be read."""
    args = build_parser().parse_args(argv)
    options = predict_options(args)
    from shared_core.deploy.predict import predict
    from shared_core.deploy.predictor import open_asked
    from torch_cls_zoo.applications.openers import OPENERS

    return predict(open_asked(model_options(args), openers=OPENERS), options)


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
