"""An image-classification zoo: many nets, hard-example losses, knowledge files, curriculum, CAM."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command


def parser() -> argparse.ArgumentParser:
    """The options; none but ``--help`` yet."""
    return argparse.ArgumentParser(prog="torch_cls_zoo", description=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Say that this project is not built yet. Returns 2."""
    parser().parse_args(argv)
    print(
        "error: torch_cls_zoo is not built yet; see its README for what it will do", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    sys.exit(run_command(main))
