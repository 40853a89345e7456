"""The journey: a folder of images and a budget in, a measured table and a shipped winner out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "tools"), str(repo / "shared")]

from compare.options import parse
from shared_core.runs.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options ask for. Returns the exit code."""
    options = parse(argv)  # what is heavy comes after: --help must answer at once
    from compare.journey import run_journey

    return run_journey(options)


if __name__ == "__main__":
    from compare import main  # by its name: its errors are known as this package's

    sys.exit(run_command(main.main))
