"""The ledger of published claims: renders docs/ledger.md and finds what contradicts a record.

``docs/ledger/<project>.yaml`` lists a project's claims, ``docs/ledger/records/*.json`` what
runs measured. ``--check`` writes nothing and fails when a claim says more than its record,
when docs/ledger.md is stale, or when a document quotes a result that no record holds (see
ledger_documents.py for how a document quotes one). docs/ledger/README.md has the schema.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tools"), str(REPO / "packages"), str(REPO / "shared")]

import yaml

import ledger_documents
from ledger_claims import check_schema, load_claims
from ledger_evidence import check_evidence
from ledger_page import render
from ledger_records import Records, values_of
from shared_core.metrics.seeds import summarize


def check(root: Path) -> list[str]:
    """Everything that ``--check`` looks at, as one line a problem."""
    claims, problems = load_claims(root)
    problems += check_schema(claims)
    if problems:  # the rest needs claims that can be read
        return problems
    records = Records(root / "docs" / "ledger" / "records")
    problems += check_evidence(claims, records)
    page = root / "docs" / "ledger.md"
    if not page.is_file() or page.read_text(encoding="utf-8") != render(claims, records):
        problems.append("docs/ledger.md: stale, run `make ledger`")
    published = {
        claim["id"]: claim["published"]["value"] for entries in claims.values() for claim in entries
    }
    return problems + ledger_documents.check(root, records, published)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a problem")
    parser.add_argument(
        "--measure", metavar="FILE#KEY", nargs="+", help="print the YAML of records"
    )
    parser.add_argument("--root", type=Path, default=REPO, help="the checkout to work on")
    options = parser.parse_args(argv)
    records_folder = options.root / "docs" / "ledger" / "records"
    if options.measure:
        records = Records(records_folder)
        found, runs, problems = values_of(list(options.measure), records)
        if not problems:
            held = summarize(found)
            seeds = [seed for run in runs for seed in run["seeds"]]
            entry = {"mean": held.mean, "std": held.std, "n": held.n, "seeds": seeds}
            keys = options.measure if len(options.measure) > 1 else options.measure[0]
            print(json_to_yaml({"measured": entry, "record": keys}), end="")
    elif options.check:
        problems = check(options.root)
    else:
        claims, problems = load_claims(options.root)
        problems += check_schema(claims)
        if not problems:
            page = options.root / "docs" / "ledger.md"
            page.write_text(render(claims, Records(records_folder)), encoding="utf-8")
            print(f"wrote {page.relative_to(options.root)}")
            problems = check(options.root)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def json_to_yaml(value: Any) -> str:
    """YAML of plain values, in the order given."""
    return str(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, width=100))


if __name__ == "__main__":
    sys.exit(main())
