"""The result record: what was measured, on what data, with which seeds, versions and hardware."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shared_core.runs.environment import environment
from shared_core.runs.json_files import write_json
from shared_core.runs.log import _plain

SCHEMA = "smallvision.record/1"
KINDS = ("real", "subset", "built-in")
_REQUIRED = {
    "schema": str,
    "task": str,
    "command": str,
    "scale": str,
    "data": dict,
    "seeds": list,
    "measured": dict,
    "environment": dict,
    "started": str,
    "wall_seconds": float,
}
_DATA_REQUIRED = ("name", "kind", "images", "pixels", "split_hash")


class RecordError(ValueError):
    """A record that lacks something or contradicts itself."""


def check_record(record: dict[str, Any], where: str = "record") -> None:
    """Refuse a record that does not say what was measured on what.

    Raises:
        RecordError: a key is missing or of another type, the data's kind is unknown, or built-in
            data is claimed for a full-scale run.
    """
    for key, kind in _REQUIRED.items():
        if key not in record:
            raise RecordError(f"{where} lacks {key!r}")
        value = record[key]
        if not isinstance(value, (int, float) if kind is float else kind):
            raise RecordError(f"{where}: {key} is {type(value).__name__}, expected {kind.__name__}")
    if record["schema"] != SCHEMA:
        raise RecordError(f"{where}: schema {record['schema']!r}, expected {SCHEMA!r}")
    for key in _DATA_REQUIRED:
        if key not in record["data"]:
            raise RecordError(f"{where}: data lacks {key!r}")
    if record["data"]["kind"] not in KINDS:
        raise RecordError(
            f"{where}: data kind {record['data']['kind']!r}, expected one of {', '.join(KINDS)}"
        )
    if record["data"]["kind"] == "built-in" and record["scale"] != "rehearsal":
        raise RecordError(f"{where}: built-in data at scale {record['scale']!r} is a rehearsal")
    if not record["measured"]:
        raise RecordError(f"{where}: nothing was measured")


def write_result(
    path: str | Path,
    *,
    task: str,
    command: str,
    scale: str,
    data: dict[str, Any],
    seeds: list[int],
    measured: dict[str, Any],
    started: datetime,
    wall_seconds: float,
) -> dict[str, Any]:
    """Write ``result.json`` atomically and return what it holds.

    Args:
        path: the file.
        task: what was run, for example ``gfnet_dynn/aid``.
        command: the command that made it, as a user would type it.
        scale: ``full``, ``short`` or ``rehearsal``.
        data: ``name``, ``kind`` (``real``, ``subset`` or ``built-in``), ``images``, ``pixels``
            (side in pixels), ``split_hash``.
        seeds: every seed that the run used.
        measured: nested dictionary of numbers; accuracies are fractions in ``[0, 1]``.
        started: when, with a time zone.
        wall_seconds: how long it took, resumed parts together.

    Raises:
        RecordError: see :func:`check_record`.
    """
    record = _plain(
        {
            "schema": SCHEMA,
            "task": task,
            "command": command,
            "scale": scale,
            "data": data,
            "seeds": seeds,
            "measured": measured,
            "environment": environment(),
            "started": started.astimezone(timezone.utc).isoformat(timespec="seconds"),
            "wall_seconds": round(float(wall_seconds), 1),
        }
    )
    check_record(record, str(path))
    write_json(path, record)
    return dict(record)


def read_result(path: str | Path) -> dict[str, Any]:
    """Read and check a record.

    Raises:
        FileNotFoundError: there is none.
        RecordError: it is not JSON, or :func:`check_record` refuses it.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(f"{path} holds {type(record).__name__}, expected an object")
    check_record(record, str(path))
    return record
