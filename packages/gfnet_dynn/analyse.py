"""Analyse a finished run from its stored outputs; ``--help`` lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from gfnet_dynn.choices import RULES
from shared_core.runs.command import run_command
from shared_core.runs.numbers import number
from shared_core.runs.options import CommandParser

INSIDE = number(float, 1e-6, 1 - 1e-6)  # a fraction that is neither 0 nor 1
SHARE = number(float, 0, 1, open_low=True)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="analyse.py",
        description="What the exits of a finished run can do: thresholds for every rule, budgets, "
        "conformal sets, risk control, exits worth keeping. No network is run.",
        epilog="Writes analysis.json, analysis.md, analysis.html and plots to RUN_FOLDER/analysis.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN_FOLDER", help="A run with its evaluate stage."
    )
    for flag, kind, many, default, letter, text in (
        ("--max-accuracy-loss", INSIDE, None, 0.01, "X",
         "What balanced thresholds may lose, and the risk that may be taken."),
        ("--confidence", INSIDE, None, 0.9, "P", "How sure the risk control has to be."),
        ("--alpha", INSIDE, "+", (0.01, 0.05, 0.1), "A",
         "The share of conformal sets that may miss the class."),
        ("--budgets", SHARE, "+", (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "B",
         "Mean costs, shares of a full run's MACs."),
    ):  # fmt: skip
        parser.add_argument(flag, type=kind, nargs=many, default=default, metavar=letter, help=text)
    parser.add_argument(
        "--policy",
        choices=RULES,
        help="The rule of conformal sets and placement (default: the run's own).",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse, print, write. Returns the exit code."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see main.py
    from gfnet_dynn.report.analysis_page import analyse_run

    return analyse_run(
        args.run,
        kind=args.policy,
        max_accuracy_loss=args.max_accuracy_loss,
        confidence=args.confidence,
        alphas=sorted(set(args.alpha)),
        budgets=sorted(set(args.budgets)),
    )


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
