"""The metric log: one JSON object a line, flushed, cut back to the resumed position."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    """NumPy scalars to Python's; NaN and infinities to None, which JSON can hold."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return [_plain(v) for v in (value.tolist() if hasattr(value, "tolist") else value)]
    return value


class MetricLog:
    """Append-only ``metrics.jsonl``; a line is on disk when ``write`` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. Non-finite numbers are written as ``null``."""
        line = json.dumps(_plain(values), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def position(self) -> int:
        """Bytes written so far; store it in a run's state."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Drop what was written after ``position``: a resumed run writes it again."""
        if not self.path.exists():
            if position:
                raise FileNotFoundError(
                    f"{self.path} is gone: a resumed run expected {position} bytes there"
                )
            return
        if self.path.stat().st_size < position:
            raise ValueError(
                f"{self.path} holds {self.path.stat().st_size} bytes, "
                f"the resumed run had written {position}"
            )
        with self.path.open("r+b") as stream:
            stream.truncate(position)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metric log; a last line cut short by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
