"""torch_cls_zoo: train, evaluate, distil, look at and convert a classifier; see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options ask for. Returns the exit code."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from torch_cls_zoo.config import parse

    config = parse(argv)  # what is heavy comes after: --help must answer at once
    from torch_cls_zoo.applications.dispatch import run_main

    return run_main(config)


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
