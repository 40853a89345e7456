"""One place for what a run of several stages says: the metric log, the stages done, a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared_core.runs.json_files import write_text
from shared_core.runs.log import MetricLog

STAGES_FILE = "stages.json"


def _nothing() -> None:
    """What happens at a write that nobody listens to."""


class StageLog:
    """Metrics to ``metrics.jsonl``, results of finished stages to ``stages.json``.

    Args:
        folder: the run's folder.
        silent: say and write nothing, and remember the results: for all processes of a run but
            the main one.

    Attributes:
        folder: the run's folder.
        silent: see above.
        metrics: the log of numbers.
        stages: result by stage, of those that are finished.
        tick: called after every write.
    """

    def __init__(self, folder: str | Path, *, silent: bool = False) -> None:
        self.folder, self.silent = Path(folder), silent
        self.metrics = MetricLog(self.folder / "metrics.jsonl")
        self._file = self.folder / STAGES_FILE
        self.tick: Callable[[], object] = _nothing
        self.stages: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.stages = json.loads(self._file.read_text(encoding="utf-8"))

    def say(self, text: str) -> None:
        """One line for the user."""
        if not self.silent:
            print(text, flush=True)

    def write(self, stage: str, split: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics of ``split`` (``train``, ``val``) at ``step``."""
        if not self.silent:
            self.metrics.write({"stage": stage, "split": split, "step": step, **values})
            self.tick()

    def begin(self) -> None:
        """A stage starts from nothing: lines that a killed try of it wrote are dropped."""
        if not self.silent:
            ends = (done["log_position"] for done in self.stages.values())
            self.metrics.cut(max(ends, default=0))

    def done(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, or None."""
        return self.stages.get(stage)

    def finish(self, stage: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write down that ``stage`` is finished, with what later stages and the record need."""
        kept = {**result, "log_position": 0 if self.silent else self.metrics.position()}
        self.stages[stage] = kept
        if not self.silent:
            write_text(self._file, json.dumps(self.stages, indent=2) + "\n")
            self.tick()
        return kept
