"""landmark_distill: teach a student through the teacher's frozen head, test it; see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Train and test, or test alone. Returns the exit code."""
    from landmark_distill.parsing import parse

    config = parse(argv, prog="main.py")
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from landmark_distill.session import run_main

    return run_main(config, sys.argv[1:] if argv is None else list(argv))


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
