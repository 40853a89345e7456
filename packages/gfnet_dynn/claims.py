"""Try the method's claims on a finished run, with several seeds; ``--help`` lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import WEIGHT
from shared_core.runs.options import CommandParser, add_common, words_of
from shared_core.trials.trial_options import add_trial_options, check_trial_options

WHAT = ("tradeoff", "exits", "distil")


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="claims.py",
        description="Try what is claimed of the method on a finished run: accuracy falls as lambda "
        "grows, few exits beat all exits, early exit is faster, distilled beats from scratch.",
        epilog="Writes result.json, report.md and report.html to OUTPUT. Start the same command "
        "again to go on after a stop.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_FOLDER", help="A run whose student is trained.")
    add("output", type=Path, metavar="OUTPUT", help="The folder of the trials.")
    add(
        "--what",
        nargs="+",
        choices=WHAT,
        default=["tradeoff", "exits"],
        help="Which claims: lambda, few exits against all, distilled against from scratch.",
    )
    add_trial_options(parser)
    add(
        "--vary",
        choices=("exits", "student"),
        default="exits",
        help="What a seed decides: the exits on the run's one student, or a student of its own "
        "as well, which takes longer.",
    )
    add(
        "--tradeoffs",
        nargs="+",
        type=WEIGHT,
        default=[0.1, 0.75, 2.0],
        metavar="LAMBDA",
        help="The prices of compute that are compared.",
    )
    add_common(
        parser,
        ("data-path", "threads", "device"),
        defaults={"device": None},
        help={
            "data-path": "Where the run's images lie now, if elsewhere.",
            "threads": "How many CPU threads compute (default: the run's).",
            "device": "Where to compute: auto, cpu, cuda (default: the run's).",
        },
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials that are missing, then write the record. Returns the exit code."""
    args = build_parser().parse_args(argv)
    check_trial_options(args)
    if args.output.resolve() == args.run.resolve():
        raise UsageError(f"{args.output} is the run itself: expected another folder")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see main.py
    from gfnet_dynn.report.claims_page import try_claims

    return try_claims(args, words_of(argv))


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
