"""Times side by side, and the lines of a benchmark's table that come of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int, *, repeats: int = 1
) -> dict[str, list[float]]:
    """CPU seconds of this process a call, by name, round by round; one round more warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(repeats):
                run()
            if number:
                times[name].append((time.process_time() - start) / repeats)
    return times


def row(name: str, ours: list[float], theirs: list[float], **rest: Any) -> dict[str, Any]:
    """One line of the table; milliseconds."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    sides = [round(statistics.median(side) * 1e3, 3) for side in (ours, theirs)]
    return _line(name, *sides, ratios, unit="ms", **rest)


def share(name: str, value: float, *, goal: float | None, equal: str) -> dict[str, Any]:
    """One line for a share of the images, in ``[0, 1]``, beside all of them."""
    return _line(name, round(value, 4), 1.0, [value], unit="of all", goal=goal, equal=equal)


def _line(
    name: str, ours: float, theirs: float, ratios: list[float], *, goal: float | None, **rest: Any
) -> dict[str, Any]:
    median = round(statistics.median(ratios), 3)
    met = None if goal is None else median >= goal
    verdict = "" if goal is None else f"  goal {goal:g}: {'met' if met else 'not met'}"
    print(
        f"{name:<66}{ours:>10.2f}{theirs:>10.2f}  {median:6.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}){verdict}",
        flush=True,
    )
    return {
        "name": name, "ours": ours, "theirs": theirs, "ratio_median": median,
        "ratio_min": round(ratios[0], 3), "ratio_max": round(ratios[-1], 3), "goal": goal,
        "met": met, "skipped": None, **rest,
    }  # fmt: skip


def skipped(name: str, goal: float | None, reason: str) -> dict[str, Any]:
    """A line that was not measured."""
    print(f"{name:<66} skipped: {reason}", flush=True)
    nothing = dict.fromkeys(("ours", "theirs", "ratio_median", "ratio_min", "ratio_max", "met"))
    return {"name": name, **nothing, "goal": goal, "skipped": reason, "equal": None}
