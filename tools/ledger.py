"""The ledger of published claims: renders docs/ledger.md and finds what contradicts a record.

``docs/ledger/<project>.yaml`` lists a project's claims, ``docs/ledger/records/*.json`` what
runs measured. ``--check`` writes nothing and fails when a claim says more than its record,
when docs/ledger.md is stale, or when a document quotes a result that no record holds (see
ledger_documents.py for how a document quotes one). docs/ledger/README.md has the schema.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tools"), str(REPO / "packages"), str(REPO / "shared")]

import yaml

import ledger_documents
from ledger_records import Records, values_of
from shared_core.metrics.seeds import summarize

PROJECTS = ("gfnet_dynn", "landmark_distill", "visiondistill_gc", "torch_cls_zoo", "mpkd")
STATUSES = {
    "reproduced": "the published protocol, and the published number within the tolerance",
    "within band": "real data, but a protocol that differs as stated; inside its own band",
    "not reproduced": "the published protocol, but another number",
    "rehearsed": "the recipe ran on built-in data or in a shortened form: no evidence",
    "not attempted": "not run here, for the reason given",
}
FIELDS = {
    "id": str,
    "claim": str,
    "source": str,
    "published": dict,
    "protocol": str,
    "data": (dict, type(None)),
    "command": str,
    "tolerance": (dict, type(None)),
    "band": (list, type(None)),
    "status": str,
    "reason": (str, type(None)),
    "measured": (dict, type(None)),
    "hardware": (str, type(None)),
    "date": (str, date, type(None)),
    "record": (str, list, type(None)),
    "check": (dict, type(None)),
}
OPTIONAL = {"band", "reason", "measured", "hardware", "date", "record", "check", "tolerance"}


def load_claims(root: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The claims of each project, defaults filled in, and what is wrong with the files."""
    claims: dict[str, list[dict[str, Any]]] = {}
    problems: list[str] = []
    for project in PROJECTS:
        path = root / "docs" / "ledger" / f"{project}.yaml"
        name = path.relative_to(root)
        if not path.is_file():
            problems.append(f"{name}: missing")
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            problems.append(f"{name}: not YAML: {' '.join(str(error).split())}")
            continue
        if not isinstance(content, dict) or content.get("project") != project:
            problems.append(f"{name}: expected a mapping with project: {project}")
            continue
        defaults = content.get("defaults") or {}
        entries = content.get("claims")
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            problems.append(f"{name}: claims is no list of mappings")
            continue
        claims[project] = [{**dict.fromkeys(OPTIONAL), **defaults, **entry} for entry in entries]
    return claims, problems


def check_schema(claims: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Fields, types and words of every claim."""
    problems, seen = [], set()
    for project, entries in claims.items():
        for number, claim in enumerate(entries, 1):
            where = f"{project}: {claim.get('id', f'claim {number}')}"
            wrong = [
                f"{where}: {field} is {claim[field]!r}, expected {_names(kinds)}"
                if field in claim
                else f"{where}: lacks {field}"
                for field, kinds in FIELDS.items()
                if field not in claim or not isinstance(claim[field], kinds)
            ]
            wrong += [f"{where}: unknown field {f!r}" for f in claim if f not in FIELDS]
            if wrong:
                problems += wrong
                continue
            if claim["id"] in seen:
                problems.append(f"{where}: another claim has this id")
            seen.add(claim["id"])
            problems += [f"{where}: {problem}" for problem in _details(claim)]
    return problems


def check_evidence(claims: dict[str, list[dict[str, Any]]], records: Records) -> list[str]:
    """Does each status follow from the published value, the record and the bands?"""
    problems = list(records.problems)
    for project, entries in claims.items():
        for claim in entries:
            where = f"{project}: {claim['id']}"
            problems += [f"{where}: {problem}" for problem in _evidence(claim, records)]
    return problems


def recompute(claim: dict[str, Any]) -> float:
    """Run the claim's ``check``: a function of ours that needs no data."""
    module, _, function = claim["check"]["function"].partition(":")
    value = getattr(importlib.import_module(module), function)
    return float(value(**claim["check"].get("arguments", {})))


def render(claims: dict[str, list[dict[str, Any]]], records: Records) -> str:
    """The text of docs/ledger.md."""
    lines = [
        "# The ledger",
        "",
        "<!-- Written by `make ledger` from docs/ledger/*.yaml: edit those. -->",
        "",
        "Every number that a paper or README published, and what came of it here.",
        "",
        "| status | meaning |",
        "|---|---|",
        *(f"| {status} | {meaning} |" for status, meaning in STATUSES.items()),
        "",
        "| project | " + " | ".join(STATUSES) + " |",
        "|---|" + "---:|" * len(STATUSES),
    ]
    for project, entries in claims.items():
        counts = [sum(c["status"] == status for c in entries) for status in STATUSES]
        link = f"[{project}](#{project})"
        lines.append(f"| {link} | " + " | ".join(str(c) if c else "" for c in counts) + " |")
    for project, entries in claims.items():
        lines += [
            "",
            f"## {project}",
            "",
            "| claim | source | data | published | measured | status | evidence |",
            "|---|---|---|---:|---:|---|---|",
        ]
        lines += [_row(claim, records) for claim in entries]
    return "\n".join(lines) + "\n"


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


def _details(claim: dict[str, Any]) -> list[str]:
    problems = []
    published, status = claim["published"], claim["status"]
    if set(published) != {"value", "unit"}:
        problems.append(f"published has {sorted(published)}, expected unit and value")
    elif published["value"] is not None and not _is_number(published["value"]):
        problems.append(f"published value is {published['value']!r}, expected a number or null")
    elif published["unit"] == "fraction" and not 0 <= (published["value"] or 0) <= 1:
        problems.append(f"published value is {published['value']}, expected a fraction in [0, 1]")
    if status not in STATUSES:
        problems.append(f"status is {status!r}, expected one of {', '.join(STATUSES)}")
    if status in ("not attempted", "not reproduced", "within band") and not claim["reason"]:
        problems.append(f"is {status!r} without a reason")
    tolerance = claim["tolerance"]
    if tolerance is not None and not (
        len(tolerance) == 1
        and set(tolerance) <= {"absolute", "relative"}
        and all(_is_number(v) and v >= 0 for v in tolerance.values())
    ):
        problems.append(f"tolerance is {tolerance}, expected {{absolute: x}} or {{relative: x}}")
    band = claim["band"]
    if band is not None and not (
        len(band) == 2 and all(_is_number(v) for v in band) and band[0] <= band[1]
    ):
        problems.append(f"band is {band}, expected [low, high]")
    data = claim["data"]
    if data is not None and not ("name" in data and set(data) <= {"name", "images", "pixels"}):
        problems.append(f"data is {data}, expected name and perhaps images and pixels, or null")
    measured = claim["measured"]
    if measured is not None:
        if not set(measured) <= {"mean", "std", "n", "seeds"} or not _is_number(
            measured.get("mean")
        ):
            problems.append(f"measured is {measured}, expected mean, std, n, seeds")
        elif measured.get("n", 1) > 1 and not _is_number(measured.get("std")):
            problems.append(f"measured has {measured['n']} runs without a deviation")
    if claim["check"] is not None and not re.fullmatch(
        r"[\w.]+:\w+", str(claim["check"].get("function", ""))
    ):
        problems.append(f"check is {claim['check']}, expected function: module:name")
    if isinstance(claim["date"], str):
        try:
            date.fromisoformat(claim["date"])
        except ValueError:
            problems.append(f"date is {claim['date']!r}, expected YYYY-MM-DD")
    return problems


def _evidence(claim: dict[str, Any], records: Records) -> list[str]:
    status, measured, check_by = claim["status"], claim["measured"], claim["check"]
    if status == "not attempted":
        if measured is not None or claim["record"] is not None:
            return ["is 'not attempted' but has a measured value or a record"]
        return []
    if measured is None:
        return [f"is {status!r} without a measured value"]
    problems = []
    if check_by is not None:
        if claim["data"] is not None:
            problems.append("is recomputed by a check, but names data")
    elif claim["record"] is None:
        return [f"is {status!r} without a record or a check"]
    else:
        found, runs, wrong = values_of(claim["record"], records)
        if wrong:
            return wrong
        problems += _same_numbers(measured, found, runs)
        problems += _same_data(claim, runs)
    mean, target = measured["mean"], claim["published"]["value"]
    close = target is not None and _within(mean, target, claim["tolerance"])
    if status == "reproduced":
        if target is None:
            problems.append("is 'reproduced' without a published value")
        elif claim["tolerance"] is None:
            problems.append("is 'reproduced' without a tolerance")
        elif not close:
            problems.append(
                f"left its band: measured {mean}, published {target}, "
                f"tolerance {claim['tolerance']}"
            )
    if status == "not reproduced" and close and claim["tolerance"] is not None:
        problems.append(f"is 'not reproduced', but {mean} is {target} within its tolerance")
    if status == "within band" and claim["band"] is None:
        problems.append("is 'within band' without a band")
    if claim["band"] is not None and not claim["band"][0] <= mean <= claim["band"][1]:
        problems.append(f"left its band: measured {mean}, expected {claim['band']}")
    return problems


def _same_numbers(
    measured: dict[str, Any], found: list[float], runs: list[dict[str, Any]]
) -> list[str]:
    """Does the claim quote what its records hold, to the digits it gives?"""
    held = summarize(found)
    problems = []
    pairs = [("mean", held.mean)]
    if held.std is not None:
        pairs.append(("std", held.std))
    for name, value in pairs:
        quoted = measured.get(name)
        if quoted is None or not _rounds_to(value, quoted):
            problems.append(f"measured {name} is {quoted}, the record holds {value:.6g}")
    if measured.get("n", 1) != held.n:
        problems.append(f"measured n is {measured.get('n', 1)}, the record holds {held.n} values")
    seeds = [seed for run in runs for seed in run["seeds"]]
    if measured.get("seeds") is not None and list(measured["seeds"]) != seeds:
        problems.append(f"measured seeds are {measured['seeds']}, the record says {seeds}")
    return problems


def _same_data(claim: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """Were the records made with the data and at the scale that the status needs?"""
    problems = []
    status, wanted = claim["status"], claim["data"]
    for run in runs:
        data, scale = run["data"], run["scale"]
        complete = data["kind"] == "real" and scale == "full"
        if status == "rehearsed":
            if complete:
                problems.append("is 'rehearsed', but its record is a full run on real data")
            continue
        if data["kind"] == "built-in" or scale == "rehearsal":
            problems.append(f"claims {status!r} from a rehearsal on built-in data")
            continue
        if wanted is not None and data["name"] != wanted["name"]:
            problems.append(f"claims {wanted['name']}, its record was made on {data['name']}")
        if status == "within band":
            continue
        if data["kind"] == "subset":
            problems.append(f"claims {status!r} from a subset of {data['name']}")
        elif scale != "full":
            problems.append(f"claims {status!r} from a run at scale {scale!r}")
        for fact in ("images", "pixels"):
            if wanted is not None and fact in wanted and data[fact] != wanted[fact]:
                problems.append(
                    f"claims {status!r} on {wanted[fact]} {fact}, its record has {data[fact]}"
                )
    return problems


def _row(claim: dict[str, Any], records: Records) -> str:
    published, measured = claim["published"], claim["measured"]
    unit = "" if published["unit"] == "fraction" else f" {published['unit']}"
    quoted = "none" if published["value"] is None else f"{_digits(published['value'])}{unit}"
    if measured is None:
        got = ""
    else:
        got = _digits(measured["mean"])
        if measured.get("n", 1) > 1:
            got += f" ± {_digits(measured['std'])} (n = {measured['n']})"
        got += unit
    data = claim["data"]
    where = "none needed" if data is None else data["name"]
    if data and "pixels" in data:
        where += f", {data['pixels']} px"
    if claim["check"] is not None and measured is not None:
        evidence = "recomputed by the tests"
    elif claim["record"] is not None:
        evidence = _record_cell(claim, records)
    else:
        evidence = f"`{claim['command']}`"
    if claim["reason"]:
        evidence += f"; {claim['reason']}"
    cells = [
        f'<a id="{claim["id"]}"></a>{claim["claim"]}',
        claim["source"],
        where,
        quoted,
        got,
        claim["status"],
        evidence,
    ]
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def _record_cell(claim: dict[str, Any], records: Records) -> str:
    names = [claim["record"]] if isinstance(claim["record"], str) else claim["record"]
    files = list(dict.fromkeys(name.partition("#")[0] for name in names))
    links = ", ".join(f"[{file}](ledger/records/{file})" for file in files)
    run = records.runs.get(files[0])
    if run is None:
        return links
    machine = run["environment"]
    hardware = claim["hardware"] or machine.get("gpu") or machine.get("cpu") or "unknown hardware"
    day = claim["date"] or str(run["started"])[:10]
    return f"{links}, {run['data']['kind']} data, {hardware}, {day}"


def _within(mean: float, target: float, tolerance: dict[str, float] | None) -> bool:
    if tolerance is None:
        return False
    reach = tolerance.get("absolute", tolerance.get("relative", 0.0) * abs(target))
    return abs(mean - target) <= reach * (1 + 1e-9) + 1e-12


def _rounds_to(value: float, quoted: float) -> bool:
    """Is ``quoted`` the value, rounded to the decimals it is written with?"""
    text = repr(quoted)
    if "e" in text:
        return math.isclose(value, quoted, rel_tol=1e-6)
    decimals = len(text.partition(".")[2]) if "." in text else 0
    return abs(value - quoted) <= 0.5 * 10.0**-decimals + 1e-12


def _digits(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(kinds: Any) -> str:
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in several)


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
