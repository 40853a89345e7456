"""Try what the papers claim, small, over several seeds; ``--help`` lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from mpkd.experiments.claim_arms import CLAIMS, DECIDED
from mpkd.experiments.parsing import add_sweep_options, sweep_options
from mpkd.experiments.recipes import CLAIMS_CIFAR10, CLAIMS_DIGITS
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.options import CommandParser, words_of


def build_parser() -> CommandParser:
    """The command line."""
    p = CommandParser(
        prog="claims.py",
        description="Try what the papers claim (mixed precision, BRECQ, Apprentice, HAQ, SDQ, "
        "MixQuant, LSQ+), small, over several seeds.",
        epilog="Without a data set: scikit-learn's digits. Writes result.json, report.md and "
        "report.html. Start the same command again to go on after a stop.",
    )
    add_sweep_options(
        p, root=None, output="Without it runs/mpkd/claims-<set>.", scale=None, threads=1
    )
    p.add_argument(
        "--what", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), metavar="CLAIM",
        help=f"Which claims are tried, of {', '.join(CLAIMS)}.",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Make the students that are missing, compare, write the record. Returns the exit code."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = build_parser().parse_args(argv)
    if args.data_root is not None and args.data_path is not None:
        raise UsageError("--data-root and --data-path: expected one of them")
    for option, path in (("--data-root", args.data_root), ("--data-path", args.data_path)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option} {path}: there is nothing")
    for text in args.settings:
        key = text.partition("=")[0].strip()
        if key in DECIDED and key != "quantization.epochs":
            raise UsageError(f"--set {text}: the arms of the claims decide {key}, expected another")
    real = args.data_root is not None or args.data_path is not None
    setting, name = (CLAIMS_CIFAR10, "cifar10") if real else (CLAIMS_DIGITS, "digits")
    options = sweep_options(
        args, name="claims", task=f"mpkd/{name}-claims", script="claims.py", words=words_of(argv),
        setting=setting, scale="short" if real else "rehearsal",
        data_key="dataset.data_dir_cifar10", about={},
        output=Path("runs") / "mpkd" / f"claims-{name}",
    )  # fmt: skip
    if options.start == "new":  # the same command again goes on
        options = replace(options, start="continue")
    from mpkd.experiments.claims_page import run_claims

    return run_claims(options, claims=args.what)


def cli() -> int:
    """The installed command ``mpkd-claims``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
