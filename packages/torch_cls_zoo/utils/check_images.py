"""Look at every image before a training: what is damaged, what is no image, what is there twice.

    python packages/torch_cls_zoo/utils/check_images.py DATA [--quarantine FILE] [--report FILE]

Exit code 0: every file can be used; 1: some cannot, each is named.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[3]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command
from shared_core.runs.numbers import COUNT
from shared_core.runs.options import CommandParser

FILE_NAME = "quarantine.txt"  # in the data folder, where the training looks for it


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog="check_images.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("data", type=Path, help="The folder with train/, val/ and test/, or with class folders.")
    add("-j", "--workers", type=COUNT, default=0, metavar="N",
        help="How many processes look; 0 is this one.")  # fmt: skip
    add("--quarantine", type=Path, nargs="?", const=Path(FILE_NAME), metavar="FILE",
        help="Write the list of files to leave out: here, or quarantine.txt in the data folder "
        "where nothing follows.")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="Write all findings (.json, .md beside).")
    add("--near", action="store_true", help="Look for nearly equal images, too.")
    args = parser.parse_args(argv)
    from shared_core.datasets import scan, write_quarantine
    from shared_core.datasets.finding.verify import verify

    report = verify(scan(args.data), workers=args.workers, near=args.near)
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


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
