"""mpkd from images to a distilled student of few bits: what config.yaml says; see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs.command import run_command
from shared_core.runs.options import words_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for. Returns the exit code."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from mpkd.options import parse

    options = parse(argv)
    from mpkd.pipeline import run_main  # loads torch, so after the words were looked at

    return run_main(options, words_of(argv))


def cli() -> int:
    """The installed command ``mpkd``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
