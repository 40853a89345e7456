"""Classify images with a trained student: files, folders, paths from standard input, HTTP."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: use this checkout, whatever is installed
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch; see main.py
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.deploy.options import (
    STDIN,
    PredictOptions,
    ServeOptions,
    add_model_options,
    add_predict_options,
    model_options,
    predict_options,
)
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import POSITIVE
from shared_core.runs.options import CommandParser, options_given

BACKENDS = ("torch", "onnxruntime", "packed", "openvino-int8")  # further ones are the core's


def build_parser() -> CommandParser:
    """The command line: the core's options, and this project's earlier spellings of them."""
    p = CommandParser(
        prog="infer.py",
        description="Classify images with a trained student, prepared as validation prepares them. "
        "The model is a .pth file of a run, its packed weights, or the folder that the export "
        "stage wrote.",
        epilog="Exit code: 0, or 1 when an image could not be read (the others are answered all "
        "the same), 2 for options that do not fit.",
    )
    add_model_options(p, runtimes=BACKENDS, aliases={"runtime": ["--backend"]})
    add_predict_options(
        p, aliases={"paths": ["--image", "--dir"], "batch-size": ["--batch"]},
        defaults={"batch-size": 64},
    )  # fmt: skip
    p.add_argument(
        "--stdin", action="store_true",
        help="Read paths from standard input, one a line, and answer each at once as a line of "
        "JSON.",
    )  # fmt: skip
    p.add_argument(
        "--http", metavar="HOST:PORT",
        help="Answer POST /predict at this address instead; port 0 takes a free one. server.py has "
        "all options of the service.",
    )  # fmt: skip
    p.add_argument(
        "--max-mb", type=POSITIVE, metavar="MB", default=10.0,
        help="With --http, how many megabytes a request may have.",
    )  # fmt: skip
    return p


def parse_address(text: str) -> tuple[str, int]:
    """``127.0.0.1:8080`` as host and port.

    Raises:
        UsageError: another form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--http {text}: expected HOST:PORT, 127.0.0.1:8080")
    return host, int(port)


def wanted(args: Namespace, given: set[str]) -> PredictOptions | ServeOptions:
    """What the words ask for: a prediction, or a service.

    Raises:
        UsageError: nothing, or options that do not go together.
    """
    images = bool(args.paths or args.more_paths or args.stdin)
    if args.http is not None:
        if images:
            raise UsageError("--http answers requests: expected no images beside it")
        host, port = parse_address(args.http)
        return ServeOptions(host=host, port=port, max_mb=args.max_mb)
    if "max_mb" in given:
        raise UsageError("--max-mb is for --http")
    if not args.stdin:
        return predict_options(args)
    form = args.format if "format" in given else "jsonl"
    words = {**vars(args), "paths": [*args.paths, STDIN], "format": form}
    return predict_options(Namespace(**words))


def open_asked_model(options: Any) -> Any:
    """The model of the options, also by this project's names of runtimes."""
    from dataclasses import replace

    from mpkd.deploy.openers import OPENERS
    from shared_core.deploy.predictor import open_asked

    if options.runtime == "onnxruntime":
        options = replace(options, runtime="onnx")
    return open_asked(options, openers=OPENERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Classify, print, write; or serve. Returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    options = wanted(args, options_given(parser, argv))
    predictor = open_asked_model(model_options(args))
    if isinstance(options, ServeOptions):
        from shared_core.deploy.service.command import serve

        return serve(predictor, options)
    from shared_core.deploy.predict import predict

    return predict(predictor, options)


def cli() -> int:
    """The installed command ``mpkd-infer``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
