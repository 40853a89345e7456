"""Give every distribution one version: ``python tools/version.py 0.2.0``; without a number, say it.

The number stands in each pyproject.toml, where packaging wants it, and in CITATION.cff; this is the
one place that changes it, and a test holds them equal.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "shared/pyproject.toml", "packages/*/pyproject.toml", "CITATION.cff")
LINE = re.compile(r'^(version\s*[=:]\s*)("?)(\d+\.\d+\.\d+\w*)("?)$', flags=re.MULTILINE)


def stated() -> dict[str, str]:
    """File -> the version it states.

    Raises:
        ValueError: a file that states none, or several.
    """
    found = {}
    for pattern in FILES:
        for path in sorted(REPO.glob(pattern)):
            numbers = [match[3] for match in LINE.finditer(path.read_text(encoding="utf-8"))]
            if len(numbers) != 1:
                raise ValueError(f"{path}: states {len(numbers)} versions, expected one")
            found[path.relative_to(REPO).as_posix()] = numbers[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the versions, or write a new one everywhere."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("number", nargs="?", help="the new version, like 0.2.0")
    number = parser.parse_args(argv).number
    if number is not None and not re.fullmatch(r"\d+\.\d+\.\d+\w*", number):
        parser.error(f"{number!r} is no version, expected one like 0.2.0")
    for name, before in stated().items():
        if number is not None:
            path = REPO / name
            text = path.read_text(encoding="utf-8")
            path.write_text(LINE.sub(rf"\g<1>\g<2>{number}\g<4>", text), encoding="utf-8")
        print(f"{name}: {before}" + (f" -> {number}" if number else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
