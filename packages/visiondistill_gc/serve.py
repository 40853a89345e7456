"""Serve a finished model over HTTP, with a drag-and-drop page; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.deploy.options import (
    add_model_options,
    add_serve_options,
    model_options,
    serve_options,
)
from shared_core.runs import run_command
from shared_core.runs.options import CommandParser
from visiondistill_gc.inference import add_class_options


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="serve.py",
        description="Serve a finished model over HTTP: a page to drop images on, POST /predict, "
        "GET /health, GET /model. Ctrl-C or SIGTERM stop it; open requests are answered first.",
        epilog="Needs: pip install 'visiondistill_gc[serve]'. There is no encryption and no login: "
        "leave it on 127.0.0.1, or put a proxy before it.",
    )
    add_model_options(p, runtimes=("paddle",), all_threads=True)
    add_serve_options(p, underscores=True)
    add_class_options(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Load, warm up, listen until told to stop. Returns the exit code."""
    args = build_parser().parse_args(argv)
    options, model = serve_options(args), model_options(args)
    from shared_core.deploy.service.command import serve
    from visiondistill_gc.deploy.openers import open_checked

    return serve(open_checked(model, categories=args.categories, use_gpu=args.use_gpu), options)


def cli() -> int:
    """The installed command; the settings come before the framework does."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait without spinning
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle warns about things nobody can change
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
