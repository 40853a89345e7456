"""The page docs/ledger.md, rendered from the claims and the records."""

from __future__ import annotations

from typing import Any

from ledger_claims import STATUSES
from ledger_records import Records


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


def _digits(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
