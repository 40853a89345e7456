"""Classify image files with a finished model; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.deploy.options import (
    add_model_options,
    add_predict_options,
    model_options,
    predict_options,
)
from shared_core.runs import run_command
from shared_core.runs.options import CommandParser


def build_parser() -> argparse.ArgumentParser:
    """The command line: the core's options under the names of this project's first README, too."""
    p = CommandParser(
        prog="inference.py",
        description="Classify image files with a finished model.",
        epilog="Exit code: 0, or 1 when an image could not be read (the others are classified all "
        "the same), 2 for options that do not fit.",
    )
    add_model_options(
        p,
        runtimes=("paddle",),
        aliases={"model": ["--model_path"]},
        help={"model": "The finished model: models_saved/best_model_fold0.pdparams, or a folder "
              "that export.py wrote."},
    )  # fmt: skip
    add_predict_options(
        p,
        aliases={
            "paths": ["--image_path"],
            "top": ["--top_k"],
            "workers": ["--num_workers"],
        },
        defaults={"every-class": True},
        without=("every-class",),
        underscores=True,
    )
    add_class_options(p)
    return p


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """``--categories`` and ``--use_gpu``, as the first README has them."""
    parser.add_argument(
        "--categories", nargs="+", metavar="NAME",
        help="The classes in the order of training. They come with the model, so this only checks "
        "that you mean the same.",
    )  # fmt: skip
    parser.add_argument(
        "--use_gpu", action="store_true", help="Run on the GPU. It is an error without one."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Classify, print, write, show. Returns the exit code."""
    args = build_parser().parse_args(argv)
    options, model = predict_options(args), model_options(args)
    from shared_core.deploy.predict import Summary, predict
    from visiondistill_gc.deploy.openers import open_checked

    folders = [path for path in options.paths if Path(path).is_dir()]

    def line(answer: Any) -> str:
        (_, best), *rest = answer.ranked
        others = ", ".join(f"{label} {p:.4f}" for label, p in rest)
        said = f"[{answer.name}] --> Predicted: {answer.label}, Confidence: {best:.4f}"
        return said + (f" ({others})" if others else "")

    def end(summary: Summary) -> str:
        where = ", ".join(folders)
        return f"Processed {summary.images} images in directory: {where}" if folders else ""

    predictor = open_checked(model, categories=args.categories, use_gpu=args.use_gpu)
    return predict(predictor, options, line=line, end=end)


def cli() -> int:
    """The installed command; the settings come before the framework does."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait without spinning
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle warns about things nobody can change
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
