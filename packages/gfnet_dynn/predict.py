"""Classify images: class, probability, exit taken and time; ``--help`` lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.deploy.options import (
    add_exit_options,
    add_model_options,
    add_predict_options,
    exit_options,
    model_options,
    predict_options,
)
from shared_core.runs.command import run_command
from shared_core.runs.options import CommandParser


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="predict.py",
        description="Classify images with a finished model; easy images leave it early. MODEL is a "
        ".pth file of this project (RUN/checkpoint/best/*.pth, or a plain backbone or student), or "
        "a folder that export_model.py wrote.",
        epilog="Exit code: 0, or 1 when an image could not be read (the others are classified all "
        "the same), 2 for options that do not fit.",
    )
    add_model_options(parser, runtimes=("torch",), defaults={"device": "auto"})
    add_predict_options(
        parser,
        defaults={"batch-size": 64},
        aliases={"batch-size": ("--batch",), "workers": ("--num_workers",)},
    )
    add_exit_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Classify, print, write. Returns the exit code."""
    args = build_parser().parse_args(argv)
    model, images, exits = model_options(args), predict_options(args), exit_options(args)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see main.py
    from gfnet_dynn.deploy.checkpoint import open_checkpoint
    from shared_core.deploy.answers import Answer, text_line
    from shared_core.deploy.predict import predict
    from shared_core.deploy.predictor import open_asked

    def line(answer: Answer) -> str:
        return f"{text_line(answer)}  {answer.ms:.2f} ms"

    predictor = open_asked(model, openers=(open_checkpoint,))
    return predict(predictor.with_exits(exits), images, line=line)


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
