"""The original's command: every flag of it, with its defaults; ``--help`` lists them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from gfnet_dynn.options import build_parser
from shared_core.runs.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the flags' own defaults. Returns the exit code."""
    # --help and wrong words end here, before torch loads.
    build_parser("main_dynn.py").parse_args(argv)
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from gfnet_dynn.pipeline import run_main

    return run_main(argv, prog="main_dynn.py", scale=None)


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
