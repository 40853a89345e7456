"""Garbage classification from images to measured students; ``--help`` lists the options."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command
from shared_core.runs.options import words_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe: full when the data set is found, rehearsal otherwise. Returns the exit code."""
    from visiondistill_gc.config import parse

    settings = parse(argv, prog="main.py")
    command = shlex.join(["packages/visiondistill_gc/main.py", *words_of(argv)])
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from shared_core.for_paddle.inference import import_paddle

    import_paddle()  # once here, without its warning about a compiler cache
    from visiondistill_gc.run.pipeline import run_recipe

    run_recipe(settings, command)
    return 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
