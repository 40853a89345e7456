"""Try what the papers claim, small, over several seeds; ``--help`` lists the options."""

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
    """Make the students that are missing, compare, write the record. Returns the exit code."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from mpkd.claim_runs import run_claims

    return run_claims(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
