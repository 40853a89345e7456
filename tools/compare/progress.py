"""How far the run is: a line that moves on a terminal, plain lines in a log, with what is left."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from shared_core.runs.progress import format_seconds

TERMINAL, LOG = 0.5, 30.0  # seconds between two messages


@dataclass
class Watch:
    """One candidate while it is made.

    Args:
        label: what it is, ``lite0-128 (2 of 5)``.
        expected: seconds that it may take.
        after: seconds that what follows may take.
        log: file whose last line says what it is at.
    """

    label: str
    expected: float
    after: float
    log: Path
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _begun: float = field(default_factory=time.monotonic)
    _last: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        """Say where it is, if it is time to."""
        now, terminal = time.monotonic(), self.stream.isatty()
        if now - self._last < (TERMINAL if terminal else LOG):
            return
        self._last = now
        text = self.text(now - self._begun)
        self.stream.write(f"\r\x1b[K{text}" if terminal else text + "\n")
        self.stream.flush()

    def text(self, seconds: float) -> str:
        """The message after so many seconds."""
        left = max(0.0, self.expected - seconds) + self.after
        late = "" if seconds <= self.expected else ", longer than expected"
        at = last_line(self.log)
        return (
            f"{self.label}: {format_seconds(seconds)} of about {format_seconds(self.expected)}"
            f"{late}; about {format_seconds(left)} left in all{f'  [{at[:60]}]' if at else ''}"
        )

    def close(self) -> None:
        """Take the moving line away."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def last_line(log: Path) -> str:
    """The last line of a log that is not empty; of a line that moved, what it said last."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [one.strip() for one in text.replace("\r", "\n").splitlines() if one.strip()]
    return lines[-1] if lines else ""
