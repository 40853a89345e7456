"""One place for what a run of several stages says: the metric log, the stages done, a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_core.checkpoints.atomic import atomic_write
from shared_core.runs.log import MetricLog

STAGES_FILE = "stages.json"


class StageLog:
    """Metrics to ``metrics.jsonl``, results of finished stages to ``stages.json``.

    Attributes:
        folder: the run's folder.
        metrics: the log of numbers.
        stages: result by stage, of those that are finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.metrics = MetricLog(self.folder / "metrics.jsonl")
        self._file = self.folder / STAGES_FILE
        self.stages: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.stages = json.loads(self._file.read_text(encoding="utf-8"))

    def say(self, text: str) -> None:
        """One line for the user."""
        print(text, flush=True)

    def write(self, stage: str, split: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics of ``split`` (``train``, ``val``) at ``step``."""
        self.metrics.write({"stage": stage, "split": split, "step": step, **values})

    def begin(self) -> None:
        """A stage starts from nothing: lines that a killed try of it wrote are dropped."""
        self.metrics.cut(max((done["log_position"] for done in self.stages.values()), default=0))

    def done(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, or None."""
        return self.stages.get(stage)

    def finish(self, stage: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write down that ``stage`` is finished, with what later stages and the record need."""
        kept = {**result, "log_position": self.metrics.position()}
        self.stages[stage] = kept
        text = json.dumps(self.stages, indent=2) + "\n"
        atomic_write(self._file, lambda path: path.write_text(text, encoding="utf-8"))
        return kept
