"""What a run says: on the console, in ``logs/<run id>.log``, as numbers in a metric log."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shared_core.checkpoints import atomic_write
from shared_core.runs import StageLog

RUN_ID_FILE = "run_id.txt"


def run_id(folder: str | Path, *, name: str) -> str:
    """The run's name and the time it began; made once, read by those who go on with it."""
    path = Path(folder) / RUN_ID_FILE
    if not path.exists():
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name) or "run"
        text = f"{plain}-{stamp}\n"
        atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    return path.read_text(encoding="utf-8").strip()


class Logger(StageLog):
    """The core's log of a run, with its lines in a file as well.

    Args:
        folder: the run's.
        name: of the experiment; part of the run's id.
    """

    def __init__(self, folder: str | Path, *, name: str) -> None:
        super().__init__(folder)
        self.run_id = run_id(folder, name=name)
        self.file = self.folder / "logs" / f"{self.run_id}.log"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """One line for the user and for the file, there with the time."""
        super().say(text)
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{stamp} {text}\n")


class QuietLogger(StageLog):
    """The log of a process that does not write: it only knows which stages are done."""

    run_id = ""

    def say(self, text: str) -> None:
        """Nothing: the main process says it."""

    def write(self, stage: str, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def begin(self) -> None:
        """Nothing."""

    def finish(self, stage: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Remember it for the stages that follow."""
        self.stages[stage] = dict(result)
        return self.stages[stage]
