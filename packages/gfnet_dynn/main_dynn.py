"""The original's command: every flag of it, with its defaults; ``--help`` lists them."""

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
    """Run with the flags' own defaults. Returns the exit code."""
    # Threads that wait without spinning: on a busy machine spinning costs tens of times more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gfnet_dynn.pipeline import run_main

    return run_main(argv, prog="main_dynn.py", scale=None)


if __name__ == "__main__":
    sys.exit(run_command(main))
