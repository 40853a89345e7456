"""Progress: a moving line with the remaining time on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def progress(
    iterable: Iterable[T],
    *,
    total: int,
    label: str,
    done: int = 0,
    every: float | None = None,
    stream: TextIO | None = None,
) -> Iterator[T]:
    """Yield the items of ``iterable`` and say how far it is and how long it will take.

    Args:
        iterable: what to go through.
        total: how many items there are, those finished earlier included.
        label: what they are, for example ``epoch 3/12``.
        done: items finished earlier, by a run that is being resumed.
        every: seconds between two messages; by default 0.2 on a terminal and 30 in a log.
        stream: standard error by default.
    """
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    pause = every if every is not None else (0.2 if terminal else 30.0)
    start = last = time.monotonic()
    count = 0
    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= pause:
            last = now
            left = (now - start) / count * (total - done - count)
            text = f"{label}: {done + count}/{total}, {format_seconds(left)} left"
            out.write(f"\r\x1b[K{text}" if terminal else text + "\n")
            out.flush()
    if terminal:
        out.write("\r\x1b[K")
        out.flush()
