"""``smallvision``: what needs no project. Any model folder of any of them, any folder of images.

``smallvision predict|evaluate|serve MODEL ...``, ``smallvision verify|prepare ...`` for data sets,
``smallvision weights`` for trained networks to start from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from shared_core.dataset_options import prepare_options, verify_options
from shared_core.deploy.options import (
    add_evaluate_options,
    add_exit_options,
    add_model_options,
    add_predict_options,
    add_serve_options,
    evaluate_options,
    exit_options,
    model_options,
    predict_options,
    serve_options,
)
from shared_core.runs.command import run_command
from shared_core.runs.options import CommandParser

Parse = Callable[[Sequence[str]], int]


def _parser(name: str, description: str, epilog: str | None = None) -> CommandParser:
    return CommandParser(prog=f"smallvision {name}", description=description, epilog=epilog)


def predict_command(argv: Sequence[str]) -> int:
    """``smallvision predict MODEL PATH ...``"""
    p = _parser(
        "predict",
        "Classify images, folders of images, videos or a camera with a finished model.",
        "Exit code: 0, or 1 when an image could not be read (the others are answered all the "
        "same) or there was none, 2 for options that do not fit.",
    )
    add_model_options(p)
    add_predict_options(p)
    add_exit_options(p)
    args = p.parse_args(argv)
    model, options, exits = model_options(args), predict_options(args), exit_options(args)

    from shared_core.deploy.predict import predict
    from shared_core.deploy.predictor import open_asked

    return predict(open_asked(model).with_exits(exits), options)


def evaluate_command(argv: Sequence[str]) -> int:
    """``smallvision evaluate MODEL DATA ...``"""
    p = _parser(
        "evaluate",
        "Judge a finished model on labelled images: accuracy with its 95 % interval, per class, "
        "confusion, calibration, latency, and agreement with another model.",
        "Exit code: 0, or 1 when an image could not be read or another thing went wrong, 2 for "
        "options that do not fit.",
    )
    add_model_options(p)
    add_evaluate_options(p)
    add_exit_options(p)
    args = p.parse_args(argv)
    model, options, exits = model_options(args), evaluate_options(args), exit_options(args)

    from shared_core.deploy.evaluate import run_evaluate
    from shared_core.deploy.predictor import open_asked

    predictor = open_asked(model).with_exits(exits)
    other = None
    if options.against is not None:
        other = open_asked(replace(model, model=options.against, runtime="auto"))
    return run_evaluate(predictor, options, other=other)


def serve_command(argv: Sequence[str]) -> int:
    """``smallvision serve MODEL ...``"""
    p = _parser(
        "serve",
        "Serve a finished model over HTTP: a page to drop images on, POST /predict, GET /health, "
        "GET /model. Ctrl-C or SIGTERM stop it; open requests are answered first.",
        "Needs: pip install 'shared-core[serve]'. There is no encryption and no login: leave it "
        "on 127.0.0.1, or put a proxy before it.",
    )
    add_model_options(p, all_threads=True)
    add_serve_options(p)
    add_exit_options(p)
    args = p.parse_args(argv)
    model, options, exits = model_options(args), serve_options(args), exit_options(args)

    from shared_core.deploy.predictor import open_asked
    from shared_core.deploy.service.command import serve

    return serve(open_asked(model).with_exits(exits), options)


def verify_command(argv: Sequence[str]) -> int:
    """``smallvision verify FOLDER ...``"""
    options = verify_options(argv, prog="smallvision verify")
    from shared_core.datasets.finding.verify import run_verify

    return run_verify(options)


def prepare_command(argv: Sequence[str]) -> int:
    """``smallvision prepare SOURCE TARGET ...``"""
    options = prepare_options(argv, prog="smallvision prepare")
    from shared_core.datasets.finding.prepare import run_prepare

    return run_prepare(options)


def weights_command(argv: Sequence[str]) -> int:
    """``smallvision weights ...``"""
    from shared_core.weights.command import main as command

    return command(argv)


COMMANDS: dict[str, tuple[Parse, str]] = {
    "predict": (predict_command, "Classify images, folders, videos with a finished model."),
    "evaluate": (evaluate_command, "Judge a finished model on labelled images."),
    "serve": (serve_command, "Serve a finished model over HTTP, with a page to drop images on."),
    "verify": (verify_command, "Decode every image of a data set and say what is wrong."),
    "prepare": (prepare_command, "Make an archive or a folder a checked data set with its split."),
    "weights": (weights_command, "List and find trained networks to start from."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the words to a command. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = CommandParser(
        prog="smallvision",
        description="What needs no project: any model folder, any folder of images.",
        epilog=f"commands:\n{listed}\n\nEach command has a --help of its own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="What to do, see below.")
    name = parser.parse_args(words[:1]).command
    return COMMANDS[name][0](words[1:])


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
