"""What a run says: on the console, in ``logs/<run id>.log``, as numbers in a metric log."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

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
        silent: say and write nothing: for all processes of a run but the main one.
    """

    def __init__(self, folder: str | Path, *, name: str, silent: bool = False) -> None:
        super().__init__(folder, silent=silent)
        if silent:
            self.run_id = ""
            return
        self.run_id = run_id(folder, name=name)
        self.file = self.folder / "logs" / f"{self.run_id}.log"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """One line for the user and for the file, there with the time."""
        super().say(text)
        if self.silent:
            return
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{stamp} {text}\n")
