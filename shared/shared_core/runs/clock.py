"""How long a run has taken, all its processes together: a kill loses seconds, a resume none."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path

from shared_core.runs.json_files import read_object, write_json

CLOCK_FILE = ".clock.json"
EVERY = 5.0  # seconds between two writes at most


class RunClock:
    """Wall time of a run, kept in its folder.

    Args:
        folder: the run's; what earlier processes wrote there counts.
        writes: False in processes that only read.

    Attributes:
        started: when the run's first process began, with a time zone.
    """

    def __init__(self, folder: str | Path, *, writes: bool = True) -> None:
        self._file, self._writes = Path(folder) / CLOCK_FILE, writes
        self.started, self._before = datetime.now(timezone.utc), 0.0
        self._since = self._written = time.monotonic()
        if self._file.exists():
            known = read_object(self._file)
            self.started = datetime.fromisoformat(known["started"])
            self._before = float(known["seconds"])
        self.mark(every=0.0)

    @property
    def seconds(self) -> float:
        """Wall time so far, that of earlier processes included."""
        return self._before + time.monotonic() - self._since

    def mark(self, *, every: float = EVERY) -> None:
        """Write the time down, if the last time is ``every`` seconds ago."""
        now = time.monotonic()
        if self._writes and now - self._written >= every:
            self._written = now
            about = {"started": self.started.isoformat(), "seconds": round(self.seconds, 3)}
            write_json(self._file, about)
