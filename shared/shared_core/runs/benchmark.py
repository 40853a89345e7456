"""The record of a benchmark: ours beside what a user would take instead, measured in one run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from shared_core.runs.environment import environment
from shared_core.runs.json_files import write_json
from shared_core.runs.log import _plain


def write_benchmark(
    path: str | Path, *, topic: str, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write ``{topic, date, environment, rows}`` atomically and return it.

    Args:
        path: the file.
        topic: name of the script below ``tools/bench``.
        rows: each with ``name``, ``ours``, ``theirs``, ``ratio_median``, ``ratio_min``,
            ``ratio_max``, ``goal``, ``met`` (None when skipped), ``skipped``, ``equal``.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"benchmark {topic}: no rows, expected at least one")
    record = _plain(
        {
            "topic": topic,
            "date": date.today().isoformat(),
            "environment": environment(),
            "rows": list(rows),
        }
    )
    write_json(path, record)
    return dict(record)
