"""Measure the README's table of networks again, beside the published values; see ``--help``."""

# ruff: noqa: E402
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

from shared_core.runs import Report, UsageError, run_command, write_result

DATA = {"name": "no images: costs do not depend on them", "kind": "built-in", "images": 0,
        "split_hash": None}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="compare_models.py",
        description="Parameters, multiply-adds, CPU time and ONNX size of the networks of the "
        "README's table (6 classes, 224 pixels), or of others.",
    )
    p.add_argument("--output", type=Path, required=True, metavar="DIR",
                   help="gets result.json, report.md and report.html")  # fmt: skip
    p.add_argument("-a", "--arch", nargs="+", help="networks (those of the README's table)")
    p.add_argument("--rounds", type=int, default=7, help="of timing, 0 for none (7)")
    p.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True,
                   help="measure the size as ONNX (yes)")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = build_parser().parse_args(argv)
    if args.rounds < 0:
        raise UsageError(f"--rounds {args.rounds}, expected 0 or more")
    words = ["compare_models.py", *(sys.argv[1:] if argv is None else [str(w) for w in argv])]
    compare(
        args.output, archs=args.arch, rounds=args.rounds, onnx=args.onnx, command=" ".join(words)
    )
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
    from torch_cls_zoo.experiments.model_table import (
        BASE,
        COLUMNS,
        PIXELS,
        PUBLISHED,
        costs,
        forward_ratios,
        onnx_bytes,
        table_cells,
        table_row,
    )  # fmt: skip
    from torch_cls_zoo.models import resolve

    started, clock = datetime.now(timezone.utc), time.monotonic()
    names = list(dict.fromkeys(archs or PUBLISHED))
    for name in names:
        resolve(name)  # a wrong name is told before any work
    times = forward_ratios(names, rounds=rounds) if rounds else {}
    rows = []
    for name in names:
        found = {**costs(name), **times.get(name, {})}
        if onnx:
            found["onnx_bytes"] = onnx_bytes(name)
        rows.append(table_row(name, found))
        print("  ".join(table_cells(rows[-1])), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    report = Report("Networks: measured beside the published table")
    report.text(
        f"6 classes, {PIXELS} x {PIXELS} pixels, one image. 'count' is the published table's own "
        "counting (it calls it FLOPs): products, biases, BatchNorm, ReLU and pooling windows; MACs "
        f"are the products alone. Times are CPU time of one thread divided by {BASE}'s, taken in "
        "turns: median (least to largest). The published times are of a Mac that is not named, so "
        "their ratios are a hint only. No accuracy is compared."
    )
    report.table(COLUMNS, [table_cells(row) for row in rows])
    for row in rows:
        if row.get("why"):
            report.text(f"* {row['arch']}: {row['why']}.")
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


if __name__ == "__main__":
    sys.exit(run_command(main))
