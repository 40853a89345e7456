"""Look at every image before a training: what is damaged, what is no image, what is there twice.

    python packages/torch_cls_zoo/utils/check_images.py DATA [--quarantine FILE] [--report FILE]

Exit code 0: every file can be used; 1: some cannot, each is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.datasets import scan, write_quarantine
from shared_core.datasets.finding.quarantine import FILE_NAME
from shared_core.datasets.finding.verify import counter_line, verify
from shared_core.runs import UsageError, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="check_images.py", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train/, val/, test/ or class folders")
    parser.add_argument("-j", "--workers", type=int, default=0, help="processes; 0: this one")
    parser.add_argument(
        "--quarantine", type=Path, nargs="?", const=Path(FILE_NAME),
        help="write the list of files to leave out: here, or quarantine.txt in the data folder",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, help="write all findings here (.json, .md beside)")
    parser.add_argument("--near", action="store_true", help="look for nearly equal images, too")
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise UsageError(f"--workers is {args.workers}, expected 0 or more")
    listing = scan(args.data)
    report = verify(
        listing,
        workers=args.workers,
        near=args.near,
        progress=counter_line("check") if sys.stderr.isatty() else None,
    )
    bad = report.quarantine()
    for path, reason in sorted(bad.items()):
        print(f"{path}: {reason}")
    print(report.summary())
    if args.report:
        report.write(args.report)
    if args.quarantine is not None:
        place = args.data / FILE_NAME if str(args.quarantine) == FILE_NAME else args.quarantine
        write_quarantine(place, bad)
        print(f"{len(bad)} files to leave out: {place}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
