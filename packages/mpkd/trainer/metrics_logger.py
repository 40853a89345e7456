"""The CSV of a run: one line an epoch of every training, cut back when a run is resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "run_id", "stage", "epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc",
    "agreement", "grad_norm", "loss_scale", "skipped_steps", "seconds",
)  # fmt: skip


class MetricsLogger:
    """Writes ``logs/<run id>.csv``; a run never writes into another one's file.

    Args:
        path: the file; None writes nothing (a process that is not the main one).
        run_id: stands on every line.
    """

    def __init__(self, path: str | Path | None, *, run_id: str) -> None:
        self.path = None if path is None else Path(path)
        self.run_id = run_id
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; columns that are not in ``values`` stay empty.

        Raises:
            ValueError: a column that the file has not.
        """
        unknown = set(values) - set(COLUMNS)
        if unknown:
            raise ValueError(f"metrics log: no column {sorted(unknown)[0]!r}")
        if self.path is None:
            return
        new = not self.path.exists() or self.path.stat().st_size == 0
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({"run_id": self.run_id, **{k: _shown(v) for k, v in values.items()}})
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(text.getvalue())
            stream.flush()

    def position(self) -> int:
        """Bytes written so far; part of a stage's state."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Drop what was written after ``position``: a resumed run writes it again."""
        if self.path is not None and self.path.exists() and position < self.path.stat().st_size:
            with self.path.open("r+b") as stream:
                stream.truncate(position)


def _shown(value: Any) -> Any:
    return "" if value is None else f"{value:.8g}" if isinstance(value, float) else value


def read_metrics_csv(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a CSV with numbers as numbers and empty cells as None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a CSV of this project.
    """
    rows = []
    with Path(path).open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {', '.join(COLUMNS)}")
        for line in reader:
            if None in line.values() or None in line:
                continue  # cut short by a crash
            rows.append({key: _number(key, text) for key, text in line.items()})
    return rows


def _number(key: str, text: str) -> Any:
    if key in ("run_id", "stage"):
        return text
    if not text:
        return None
    return int(text) if key in ("epoch", "step", "skipped_steps") else float(text)
