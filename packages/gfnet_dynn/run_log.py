"""The run's log, with every number also sent to the tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfnet_dynn.tracking import Tracker
from shared_core.runs import StageLog


class RunLog(StageLog):
    """What a run says, to its folder and to MLflow."""

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        super().__init__(folder)
        self.tracker = tracker

    def write(self, stage: str, split: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics; ``split`` becomes the tracker's prefix (``train``, ``val``)."""
        super().write(stage, split, step, values)
        prefix = split if stage == "exits" else f"{stage}/{split}"
        self.tracker.metrics(values, step=step, prefix=prefix)
