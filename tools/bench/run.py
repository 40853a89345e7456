"""Run the benchmarks and write docs/benchmarks.md from their records.

Every ``tools/bench/<topic>.py`` measures ours against what a user would take instead, in one
run, and leaves ``docs/ledger/records/bench-<topic>.json``; called with ``--json PATH`` it
writes its record to that path. ``--render`` only writes the page, ``--check`` only looks
whether the page is that of the records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tools"), str(REPO / "packages"), str(REPO / "shared")]

from ledger_records import Records, check_benchmark


def topics(folder: Path) -> list[str]:
    """Names of the benchmarks in a folder, sorted; helpers begin with an underscore."""
    names = [path.stem for path in folder.glob("*.py")]
    return sorted(name for name in names if name != "run" and not name.startswith("_"))


def run_topic(root: Path, topic: str, extra: list[str]) -> str | None:
    """Run one benchmark; its problem in one line, or None.

    The old record stays when the benchmark fails or writes something unsound.
    """
    records = root / "docs" / "ledger" / "records"
    records.mkdir(parents=True, exist_ok=True)
    target = records / f"bench-{topic.replace('_', '-')}.json"
    scratch = target.with_suffix(".json.tmp")
    script = root / "tools" / "bench" / f"{topic}.py"
    print(f"== {topic}", flush=True)
    try:
        code = subprocess.run(
            [sys.executable, str(script), "--json", str(scratch), *extra], cwd=root
        ).returncode
        if code:
            return f"{topic}: the benchmark ended with exit code {code}"
        if not scratch.is_file():
            return f"{topic}: the benchmark wrote no record"
        try:
            check_benchmark(json.loads(scratch.read_text(encoding="utf-8")), topic)
        except ValueError as error:
            return str(error)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return None


def render(benchmarks: dict[str, dict[str, Any]]) -> str:
    """The text of docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by `make bench` from docs/ledger/records/bench-*.json. -->",
        "",
        "Each line was measured in one run, both sides by turns on the same inputs, with the check",
        "that is named. The ratio says how many times better ours is: median (lowest to highest).",
    ]
    if not benchmarks:
        lines += ["", "No benchmark was run yet."]
    for name, record in sorted(benchmarks.items()):
        machine = record["environment"]
        cores = machine.get("cores")
        hardware = machine.get("gpu") or machine.get("cpu") or "unknown hardware"
        packages = machine.get("packages") or {}
        shown = [f"{p} {v}" for p, v in packages.items() if p in ("torch", "paddlepaddle", "numpy")]
        facts = [str(record["date"])[:10], f"{hardware}{f', {cores} cores' if cores else ''}"]
        facts += [f"Python {machine['python']}"] if "python" in machine else []
        lines += [
            "",
            f"## {record['topic']}",
            "",
            f"{', '.join(facts + shown)}; record [{name}](ledger/records/{name}).",
            "",
            "| what | ours | instead | ratio | goal | met | same result |",
            "|---|---:|---:|---:|---:|---|---|",
        ]
        lines += [_row(row) for row in record["rows"]]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    unit = row.get("unit")
    if row.get("skipped"):
        ratio, met = "", f"skipped: {row['skipped']}"
    else:
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        ratio = f"{row['ratio_median']:.2f} ({spread})"
        met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    cells = [row["name"], _side(row["ours"], unit), _side(row["theirs"], unit), ratio]
    cells += [_side(row["goal"]), met, row["equal"]]
    return (
        "| " + " | ".join(" ".join(str(c or "").split()).replace("|", "\\|") for c in cells) + " |"
    )


def _side(value: Any, unit: str | None = None) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value}"
    return f"{text} {unit}" if unit else text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topics", nargs="*", help="names; all when none is given")
    parser.add_argument("--list", action="store_true", help="print the names of the benchmarks")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md")
    parser.add_argument("--check", action="store_true", help="only say whether the page is stale")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="for the benchmarks")
    parser.add_argument("--root", type=Path, default=REPO, help="the checkout to work on")
    options = parser.parse_args(argv)
    known = topics(options.root / "tools" / "bench")
    if options.list:
        print("\n".join(known))
        return 0
    problems = []
    if not (options.render or options.check):
        unknown = [name for name in options.topics if name.replace("-", "_") not in known]
        if unknown:
            print(f"error: unknown benchmark {unknown[0]!r}; known: {', '.join(known)}",
                  file=sys.stderr)  # fmt: skip
            return 2
        wanted = [name.replace("-", "_") for name in options.topics] or known
        found = [run_topic(options.root, topic, options.extra) for topic in wanted]
        problems += [problem for problem in found if problem]
    records = Records(options.root / "docs" / "ledger" / "records")
    problems += [problem for problem in records.problems if "bench-" in problem]
    page = options.root / "docs" / "benchmarks.md"
    text = render(records.benchmarks)
    if options.check:
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            problems.append("docs/benchmarks.md: stale, run `make bench` or run.py --render")
    else:
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(options.root)}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
