"""Results that documents quote: each must be marked, and its record must hold it.

A document quotes a result by a comment right before the number::

    <!-- record: gfnet-aid-short.json#measured.student.accuracy -->0.573
    <!-- record: bench-loader.json#rows.files 256 px.ratio_median -->5.9x
    <!-- claim: gfnet-ti-imagenet-top1 -->74.6%       (the published value of a claim)

The number must be the record's value rounded to the decimals shown; ``%`` means a hundredth,
``k``, ``M`` and ``G`` a thousand, a million and a billion. Accuracy-like numbers without a
mark are errors under a heading about results, and on lines that speak of accuracy.
Quoted code is not read. A line with ``<!-- no result -->`` is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ledger_records import Records

GENERATED = ("docs/ledger.md", "docs/benchmarks.md")
PATTERNS = ("README*.md", "docs/*.md", "packages/*/README*.md", "shared/README*.md")
NUMBER = r"\s*\**(?P<number>[-+]?\d[\d,]*(?:\.\d+)?)\s?(?P<unit>%|[kMG]\b|[x×](?!\w))?"
MARK = re.compile(r"<!--\s*(?P<kind>record|claim):\s*(?P<target>.+?)\s*-->(?:" + NUMBER + ")?")
HEADING = re.compile(r"^(#{1,6})\s+(.*)")
RESULTS = re.compile(
    r"\b(results?|accurac(y|ies)|benchmarks?|measured|reproduced|speed)\b|结果|准确率|精度|指标",
    re.IGNORECASE,
)
SPEAKS_OF_ACCURACY = re.compile(
    r"\b(accuracy|accurate|top-?[15]|acc@1|ece|f1(-score)?|recall|precision of)\b|准确率|精度",
    re.IGNORECASE,
)
RATE = re.compile(r"(?<![\w.,-])(?:\d{1,3}(?:\.\d+)?\s?%|0\.\d{2,}(?!\w|\.\d))")
FACTOR = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?\s?[x×](?![\w×])")
LEVEL = re.compile(r"confidence (?:of )?95 %|95 % (?=(?:paired )?intervals?|区间|置信)")
SCALES = {"%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9, None: 1.0, "x": 1.0, "×": 1.0}


def documents(root: Path) -> list[Path]:
    """The documents that people write and read, sorted."""
    found = {path for pattern in PATTERNS for path in root.glob(pattern)}
    generated = {root / name for name in GENERATED}
    return sorted(found - generated)


def check(root: Path, records: Records, published: Mapping[str, Any]) -> list[str]:
    """Problems of all documents, one line each."""
    problems = []
    for path in documents(root):
        name = path.relative_to(root).as_posix()
        for number, line, in_results in _lines(path.read_text(encoding="utf-8")):
            where = f"{name}:{number}"
            for mark in MARK.finditer(line):
                problem = _check_mark(mark, records, published)
                if problem:
                    problems.append(f"{where}: {problem}")
            if "<!-- no result -->" in line:
                continue
            bare = re.sub(r"<!--.*?-->|\]\([^)]*\)|https?://\S+", " ", MARK.sub(" ", line))
            bare = LEVEL.sub(" ", bare)  # of an interval: no result
            suspects = RATE.findall(bare) if in_results or SPEAKS_OF_ACCURACY.search(bare) else []
            if in_results:
                suspects += FACTOR.findall(bare)
            problems += [
                f"{where}: {suspect.strip()} looks like a result without a record, expected a mark "
                "before it (see docs/ledger/README.md)"
                for suspect in suspects
            ]
    return problems


def _lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Number, text without quoted code, and "stands under a heading about results"."""
    fence = ""
    levels: list[tuple[int, bool]] = []
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r"\s*(```+|~~~+)", line)
        if opening and (not fence or opening[1].startswith(fence)):
            fence = "" if fence else opening[1]
            continue
        if fence:
            continue
        heading = HEADING.match(line)
        if heading:
            depth = len(heading[1])
            levels = [level for level in levels if level[0] < depth]
            levels.append((depth, bool(RESULTS.search(heading[2]))))
        yield number, re.sub(r"`[^`]*`", " ", line), any(about for _, about in levels)


def _check_mark(mark: re.Match[str], records: Records, published: Mapping[str, Any]) -> str | None:
    target = mark["target"]
    if mark["number"] is None:
        return f"a mark for {target} without a number after it"
    if mark["kind"] == "claim":
        if target not in published:
            return f"claim {target} does not exist"
        held = published[target]
    else:
        file, _, key = target.partition("#")
        try:
            held = records.look_up(file, key)
        except ValueError as error:
            return str(error)
    if isinstance(held, bool) or not isinstance(held, int | float):
        return f"{target} holds {held!r}, expected a number"
    shown = float(mark["number"].replace(",", ""))
    decimals = len(mark["number"].partition(".")[2])
    value = held / SCALES[mark["unit"]]
    if abs(value - shown) > 0.5 * 10.0**-decimals + 1e-9:
        return f"quotes {mark['number']}{mark['unit'] or ''}, {target} holds {held:.6g}"
    return None
