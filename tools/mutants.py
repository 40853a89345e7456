"""Put each fault of tests/mutants.yaml into a copy of the repository: its tests must fail there.

A row is a wire that was once cut without a test noticing::

    - file: packages/mpkd/quant/fake_quant.py
      why: rounding before clamping freezes every weight on the bound
      before: "    return torch.round(clamped)"      # one line of the file, there exactly once
      after: "    return torch.clamp(rounded, low, high)"
      tests: [tests/mpkd/test_mpkd_quant_basics.py::test_gradients_are_those_of_equation_3]

``make mutants`` runs every row, ``EXTRA="--only fake_quant"`` those that name a word. A row dies
when pytest says that a test failed; a test that cannot be collected is a fault of the row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[1]
ROWS = REPO / "tests" / "mutants.yaml"
KEYS = {"file", "why", "before", "after", "tests"}
FAILED = 1  # pytest's exit code for failed tests


def read_rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """The rows, each checked against the file it names.

    Raises:
        ValueError: a row that lacks something, or whose line is not there exactly once.
    """
    rows = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    for number, row in enumerate(rows):
        where = f"{path.name} row {number} ({row.get('file')})"
        if set(row) != KEYS or not row["tests"]:
            raise ValueError(f"{where}: has {sorted(row)}, expected {sorted(KEYS)}")
        lines = (REPO / row["file"]).read_text(encoding="utf-8").split("\n")
        times = lines.count(row["before"])
        if row["before"] == row["after"] or times != 1:
            raise ValueError(f"{where}: {row['before']!r} is there {times} times, expected once")
        for test in row["tests"]:
            name = test.split("::")[0]
            if not (REPO / name).is_file():
                raise ValueError(f"{where}: there is no {name}")
    return rows


def copy_repository(target: Path) -> None:
    """Every file that git knows or would take, as it lies here."""
    listed = subprocess.run(
        ["git", "-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, encoding="utf-8", errors="replace", check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, place)


def try_row(row: Mapping[str, Any], copy: Path) -> tuple[bool, str]:
    """Whether the row's tests fail with its fault in the copy, and pytest's closing line."""
    path = copy / row["file"]
    sound = path.read_text(encoding="utf-8")
    lines = sound.split("\n")
    lines[lines.index(row["before"])] = row["after"]
    path.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(copy / "packages"), str(copy / "shared")])
    environment = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, *row["tests"]], cwd=copy, capture_output=True,
            text=True, encoding="utf-8", errors="replace",
            env={**os.environ, **environment},
        )  # fmt: skip
    finally:
        path.write_text(sound, encoding="utf-8")
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return done.returncode == FAILED, lines[-1]


def main(argv: list[str] | None = None) -> int:
    """Try the rows; 1 when one of them lives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="rows that hold this word")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: 2)")
    parser.add_argument("--rows", type=Path, default=ROWS, help="another list of rows")
    args = parser.parse_args(argv)
    rows = [row for row in read_rows(args.rows) if args.only in yaml.safe_dump(row, width=10**6)]
    begun, living = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        free: Queue[Path] = Queue()
        for number in range(args.jobs):
            copy_repository(Path(scratch) / str(number))
            free.put(Path(scratch) / str(number))

        def one(row: Mapping[str, Any]) -> tuple[bool, str]:
            copy = free.get()
            try:
                return try_row(row, copy)
            finally:
                free.put(copy)

        for row, (died, line) in zip(rows, pool.map(one, rows), strict=True):
            living += not died
            print(
                f"{'dies ' if died else 'LIVES'} {row['file']}: {row['why']} ({line})", flush=True
            )
    print(f"{len(rows) - living} of {len(rows)} rows die, {time.monotonic() - begun:.0f} s")
    return 1 if living or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
