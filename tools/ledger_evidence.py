"""Does the status of a claim follow from its published value, its record and its bands?"""

from __future__ import annotations

import importlib
import math
from typing import Any

from ledger_records import Records, values_of
from shared_core.metrics.seeds import summarize


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
        if quoted is None or not rounds_to(value, quoted):
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


def _within(mean: float, target: float, tolerance: dict[str, float] | None) -> bool:
    if tolerance is None:
        return False
    reach = tolerance.get("absolute", tolerance.get("relative", 0.0) * abs(target))
    return abs(mean - target) <= reach * (1 + 1e-9) + 1e-12


def rounds_to(value: float, quoted: float) -> bool:
    """Is ``quoted`` the value, rounded to the decimals it is written with?"""
    text = repr(quoted)
    if "e" in text:
        return math.isclose(value, quoted, rel_tol=1e-6)
    decimals = len(text.partition(".")[2]) if "." in text else 0
    return abs(value - quoted) <= 0.5 * 10.0**-decimals + 1e-12
