"""Measure the README's table of networks again, beside the published values; see ``--help``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from shared_core.runs import Report, run_command, write_result
from shared_core.runs.numbers import COUNT
from shared_core.runs.options import CommandParser, words_of

DATA = {"name": "no images: costs do not depend on them", "kind": "built-in", "images": 0,
        "split_hash": None}  # fmt: skip


def build_parser() -> CommandParser:
    """The command line."""
    p = CommandParser(
        prog="compare_models.py",
        description="Parameters, multiply-adds, CPU time and ONNX size of the networks of the "
        "README's table (6 classes, 224 pixels), or of others.",
    )
    p.add_argument("--output", type=Path, required=True, metavar="DIR",
                   help="The folder that gets result.json, report.md and report.html.")  # fmt: skip
    p.add_argument("-a", "--arch", nargs="+", metavar="NAME",
                   help="The networks; without it those of the README's table.")  # fmt: skip
    p.add_argument("--rounds", type=COUNT, default=7, metavar="N",
                   help="How many times each is timed; 0 measures no time.")  # fmt: skip
    p.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True,
                   help="Measure the size as ONNX.")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = build_parser().parse_args(argv)
    command = " ".join(["compare_models.py", *words_of(argv)])
    compare(args.output, archs=args.arch, rounds=args.rounds, onnx=args.onnx, command=command)
    return 0


def compare(
    output: Path,
    *,
    archs: Sequence[str] | None = None,
    rounds: int = 7,
    onnx: bool = True,
    command: str = "compare_models.py",
) -> dict[str, Any]:
    """Measure the table and write it to ``output``. Returns the record."""
    from torch_cls_zoo.experiments.model_table import PIXELS, PUBLISHED, add_table, measure
    from torch_cls_zoo.models import resolve

    started, clock = datetime.now(timezone.utc), time.monotonic()
    names = list(dict.fromkeys(archs or PUBLISHED))
    for name in names:
        resolve(name)  # a wrong name is told before any work
    rows = measure(names, rounds=rounds, onnx=onnx, say=lambda line: print(line, flush=True))
    output.mkdir(parents=True, exist_ok=True)
    report = Report("Networks: measured beside the published table")
    add_table(report, rows)
    report.text("No accuracy is compared.")
    report.write(output)
    return write_result(
        output / "result.json",
        task="torch_cls_zoo/models",
        command=command,
        scale="rehearsal",
        data={**DATA, "pixels": PIXELS},
        seeds=[],
        measured={row["arch"]: {k: v for k, v in row.items() if k != "arch"} for row in rows},
        started=started,
        wall_seconds=time.monotonic() - clock,
    )


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
