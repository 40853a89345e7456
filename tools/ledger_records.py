"""Records of runs and benchmarks, and the numbers that a ``file#key`` points at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shared_core.runs.record import RecordError, check_record

# Of a benchmark's row; ``skipped`` and ``unit`` may be left out.
ROW_FIELDS = {
    "name", "ours", "theirs", "ratio_median", "ratio_min", "ratio_max", "goal", "met", "equal",
}  # fmt: skip
ROUNDING = 1e-3  # of ratios and goals in a record


class Records:
    """All records of a folder: ``runs`` by file name, and ``benchmarks`` by topic's file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, dict[str, Any]] = {}
        self.benchmarks: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            where = f"docs/ledger/records/{path.name}"
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                if path.name.startswith("bench-"):
                    check_benchmark(content, where)
                    self.benchmarks[path.name] = content
                else:
                    if not isinstance(content, dict):
                        raise RecordError(f"{where} holds {type(content).__name__}, not an object")
                    check_record(content, where)
                    self.runs[path.name] = content
            except json.JSONDecodeError as error:
                self.problems.append(f"{where} is not JSON: {error}")
            except ValueError as error:
                self.problems.append(str(error))

    def look_up(self, file: str, key: str) -> Any:
        """What ``key`` of ``file`` holds.

        Raises:
            ValueError: no such (sound) file, or no such key in it.
        """
        record = self.runs.get(file, self.benchmarks.get(file))
        if record is None:
            state = "is not sound" if (self.folder / file).is_file() else "does not exist"
            raise ValueError(f"record {file} {state}")
        try:
            return dig(record, key)
        except KeyError:
            raise ValueError(f"record {file} has no {key}") from None


def dig(value: Any, key: str) -> Any:
    """Follow a dotted key. Names may hold dots themselves; a list of rows is asked by ``name``.

    Raises:
        KeyError: it leads nowhere.
    """
    if not key:
        return value
    parts = key.split(".")
    if isinstance(value, list):
        rows = {str(i): item for i, item in enumerate(value)}
        rows.update({row["name"]: row for row in value if isinstance(row, dict) and "name" in row})
        value = rows
    if isinstance(value, dict):
        for end in range(len(parts), 0, -1):  # the longest name that exists
            name = ".".join(parts[:end])
            if name in value:
                try:
                    return dig(value[name], ".".join(parts[end:]))
                except KeyError:
                    continue
    raise KeyError(key)


def values_of(
    source: str | list[str], records: Records
) -> tuple[list[float], list[dict[str, Any]], list[str]]:
    """The numbers behind one or several ``file#key``: values, their runs, problems.

    A key may hold one number or a list with one number for each seed.
    """
    values: list[float] = []
    runs: dict[str, dict[str, Any]] = {}
    for item in [source] if isinstance(source, str) else source:
        file, _, key = str(item).partition("#")
        if not key:
            return [], [], [f"record is {item!r}, expected file.json#dotted.key"]
        if file.startswith("bench-"):
            return [], [], [f"record {file} is a benchmark, expected a run"]
        try:
            held = records.look_up(file, key)
        except ValueError as error:
            return [], [], [str(error)]
        numbers = held if isinstance(held, list) else [held]
        if not numbers or not all(_is_number(number) for number in numbers):
            return [], [], [f"record {item} holds no number"]
        values += [float(number) for number in numbers]
        runs[file] = records.runs[file]
    return values, list(runs.values()), []


def check_benchmark(record: Any, where: str) -> None:
    """Refuse a benchmark record that lacks something or contradicts itself.

    Raises:
        ValueError: one line.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds {type(record).__name__}, expected an object")
    for key, kind in (("topic", str), ("date", str), ("environment", dict), ("rows", list)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{where}: {key} is {record.get(key)!r}, expected {kind.__name__}")
    if not record["rows"]:
        raise ValueError(f"{where}: no rows")
    names = set()
    for row in record["rows"]:
        if not isinstance(row, dict) or not ROW_FIELDS <= set(row):
            lacks = sorted(ROW_FIELDS - set(row)) if isinstance(row, dict) else ROW_FIELDS
            raise ValueError(f"{where}: a row lacks {', '.join(lacks)}")
        name = f"{where}: row {row['name']!r}"
        if row["name"] in names:
            raise ValueError(f"{name} occurs twice")
        names.add(row["name"])
        goal, met, skipped = row["goal"], row["met"], row.get("skipped")
        if skipped:
            if met is not None:
                raise ValueError(f"{name}: met is {met} and skipped is {skipped!r}")
            continue
        if (goal is None) != (met is None):
            raise ValueError(f"{name}: met is {met} with goal {goal}, and it is not skipped")
        ratios = [row[f"ratio_{which}"] for which in ("min", "median", "max")]
        if not all(_is_number(ratio) for ratio in ratios) or ratios != sorted(ratios):
            raise ValueError(f"{name}: min, median and max ratio are {ratios}, expected rising")
        if not row["equal"]:
            raise ValueError(f"{name}: no equality check, expected a text that names it")
        if _is_number(goal) and abs(ratios[1] - goal) > ROUNDING and met != (ratios[1] > goal):
            raise ValueError(
                f"{name}: met is {met} with a ratio of {ratios[1]:.3g} and a goal of {goal}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
