"""Try the method's claims on a finished run, with several seeds; ``--help`` lists the options."""

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
    """Run the settings that are missing, then write the record. Returns the exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see main.py
    from gfnet_dynn.claim_runs import run_claims

    return run_claims(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
