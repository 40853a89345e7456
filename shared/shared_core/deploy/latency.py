"""How long models take for an image, side by side: on the CPU's own clock and on the wall's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ROUNDS = 15
_SPAN = 0.01  # seconds that a timed stretch should last at least
_MOST = 50  # runs in a stretch


def measure_latency(
    runs: Mapping[str, Callable[[Array], object]],
    images: Array,
    *,
    batches: Sequence[int] = (1, 16),
    rounds: int = ROUNDS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds an image of each model, for each batch size.

    The models take turns in every round, so that a processor that becomes slower or is shared slows
    all of them. The CPU's clock counts the time of this process alone, on all its threads: with
    one thread it is what the wall's clock would say on an idle machine.

    Args:
        runs: by name, what answers a batch.
        images: of which batches are cut; repeated where there are too few.
        batches: images at once.
        rounds: stretches that the median is taken of.

    Returns:
        By name and batch size (as text, for JSON) ``cpu_ms`` and ``wall_ms``, each for an image.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in runs}
    for size in batches:
        batch = np.ascontiguousarray(images[np.arange(size) % len(images)])
        counts = {name: _count(run, batch) for name, run in runs.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(_stretch(run, batch, counts[name]))
        for name, values in times.items():
            cpu, wall = (1e3 * np.median(values, axis=0) / size).tolist()
            found[name][str(size)] = {"cpu_ms": cpu, "wall_ms": wall}
    return found


def _count(run: Callable[[Array], object], batch: Array) -> int:
    """How many runs make a stretch that the clock can see; warms up as well."""
    run(batch)
    begin = time.perf_counter()
    run(batch)
    return int(np.clip(_SPAN / max(time.perf_counter() - begin, 1e-6), 1, _MOST))


def _stretch(run: Callable[[Array], object], batch: Array, count: int) -> tuple[float, float]:
    """Seconds a run: of the CPU, of the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        run(batch)
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count
