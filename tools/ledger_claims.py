"""The claims of the ledger: the files that list them, their fields, and what each may say."""

from __future__ import annotations

import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml

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


def _details(claim: dict[str, Any]) -> list[str]:
    problems = []
    published, status = claim["published"], claim["status"]
    if set(published) != {"value", "unit"}:
        problems.append(f"published has {sorted(published)}, expected unit and value")
    elif published["value"] is not None and not is_number(published["value"]):
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
        and all(is_number(v) and v >= 0 for v in tolerance.values())
    ):
        problems.append(f"tolerance is {tolerance}, expected {{absolute: x}} or {{relative: x}}")
    band = claim["band"]
    if band is not None and not (
        len(band) == 2 and all(is_number(v) for v in band) and band[0] <= band[1]
    ):
        problems.append(f"band is {band}, expected [low, high]")
    data = claim["data"]
    if data is not None and not ("name" in data and set(data) <= {"name", "images", "pixels"}):
        problems.append(f"data is {data}, expected name and perhaps images and pixels, or null")
    measured = claim["measured"]
    if measured is not None:
        if not set(measured) <= {"mean", "std", "n", "seeds"} or not is_number(
            measured.get("mean")
        ):
            problems.append(f"measured is {measured}, expected mean, std, n, seeds")
        elif measured.get("n", 1) > 1 and not is_number(measured.get("std")):
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


def _names(kinds: Any) -> str:
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in several)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
