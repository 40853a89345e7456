"""One place for what a run says: the metric log, the tracker, and a line on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfnet_dynn.tracking import Tracker
from shared_core.checkpoints import atomic_write
from shared_core.runs import MetricLog

STAGES_FILE = "stages.json"


class RunLog:
    """Metrics to ``metrics.jsonl`` and MLflow, results of finished stages to ``stages.json``."""

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.folder, self.tracker = folder, tracker
        self.metrics = MetricLog(folder / "metrics.jsonl")
        self._stages_file = folder / STAGES_FILE
        self.stages: dict[str, dict[str, Any]] = {}
        if self._stages_file.exists():
            self.stages = json.loads(self._stages_file.read_text(encoding="utf-8"))

    def say(self, text: str) -> None:
        """One line for the user."""
        print(text, flush=True)

    def write(self, stage: str, split: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics; ``split`` becomes the tracker's prefix (``train``, ``val``)."""
        self.metrics.write({"stage": stage, "split": split, "step": step, **values})
        prefix = split if stage == "exits" else f"{stage}/{split}"
        self.tracker.metrics(values, step=step, prefix=prefix)

    def begin(self) -> None:
        """A stage starts from nothing: lines that a killed try of it wrote are dropped."""
        self.metrics.cut(max((done["log_position"] for done in self.stages.values()), default=0))

    def done(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, or None."""
        return self.stages.get(stage)

    def finish(self, stage: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write down that ``stage`` is finished, with what later stages and the record need."""
        result = {**result, "log_position": self.metrics.position()}
        self.stages[stage] = result
        text = json.dumps(self.stages, indent=2) + "\n"
        atomic_write(self._stages_file, lambda path: path.write_text(text, encoding="utf-8"))
        return result
