"""Serve a trained student over HTTP, with a page to drop images on; see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch; see main.py
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from mpkd.inference.infer import BACKENDS, open_asked_model
from shared_core.deploy.options import (
    add_model_options,
    add_serve_options,
    model_options,
    serve_options,
)
from shared_core.runs.command import run_command
from shared_core.runs.options import CommandParser


def build_parser() -> CommandParser:
    """The command line."""
    p = CommandParser(
        prog="server.py",
        description="Serve a trained student over HTTP: a page to drop images on, POST /predict, "
        "GET /health, GET /model. Ctrl-C or SIGTERM stop it; open requests are answered first.",
        epilog="Needs: pip install 'mpkd[serve]'. There is no encryption and no login: leave it on "
        "127.0.0.1, or put a proxy before it.",
    )
    add_model_options(p, runtimes=BACKENDS, aliases={"runtime": ["--backend"]})
    add_serve_options(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Load, warm up, listen until told to stop. Returns the exit code."""
    args = build_parser().parse_args(argv)
    options = serve_options(args)
    predictor = open_asked_model(model_options(args))
    from shared_core.deploy.service.command import serve

    return serve(predictor, options)


def cli() -> int:
    """The installed command ``mpkd-serve``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
