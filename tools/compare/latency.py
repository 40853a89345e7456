"""What answering costs: time, all files in turns in one run, and the memory of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
ROUNDS = 15
STRETCH = 0.02  # seconds that a file computes in a round, at least one batch
MOST = 40  # batches in a round


@dataclass(frozen=True)
class Timed:
    """What is timed: a function of a batch, and the views ``(N, H, W, 3)`` it is given in turns."""

    run: Callable[[Images], object]
    images: Images


def measure(
    timed: Mapping[str, Timed],
    *,
    batches: Sequence[int] = (1, 16),
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds an image: by name and batch size (as text) ``p50`` and ``p95`` of the batches.

    All take turns in every round, in another order each time, so that a processor that is shared,
    or becomes slower, touches all of them alike.

    Args:
        clock: seconds; the CPU time of this process is what one thread would take on an idle
            machine. Take ``time.perf_counter`` for several threads and for a GPU.
        seed: of the orders.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in timed}
    names = sorted(timed)
    for size in batches:
        cut = {name: _batches(one.images, size) for name, one in timed.items()}
        counts = {name: _count(timed[name].run, cut[name][0], clock) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for number in rng.permutation(len(names)):
                name = names[number]
                for _ in range(counts[name]):
                    batch = cut[name][len(times[name]) % len(cut[name])]
                    begin = clock()
                    timed[name].run(batch)
                    times[name].append(clock() - begin)
        for name, values in times.items():
            p50, p95 = (1e3 * np.percentile(values, (50, 95)) / size).tolist()
            found[name][str(size)] = {"p50": p50, "p95": p95}
    return found


def _batches(images: Images, size: int) -> list[Images]:
    """As many batches as give every image its turn; images are repeated to fill the last."""
    starts = range(0, len(images), size)
    return [np.ascontiguousarray(images[np.arange(s, s + size) % len(images)]) for s in starts]


def _count(run: Callable[[Images], object], batch: Images, clock: Callable[[], float]) -> int:
    run(batch)  # warms up
    begin = clock()
    run(batch)
    return int(np.clip(STRETCH / max(clock() - begin, 1e-6), 1, MOST))


def memory_mb(folder: Path | None, form: str = "", *, threads: int = 1) -> float | None:
    """Peak resident memory, in 10^6 bytes, of a fresh process that opens a form and answers once.

    Args:
        folder: of the model; None: the process only loads what every answer needs.

    Returns:
        None where the system does not say, or the process failed.
    """
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    words = ["-c", "from compare.latency import answer_once; answer_once()"]
    words += ["" if folder is None else str(folder.resolve()), form, str(threads)]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    last = done.stdout.split()
    return float(last[-1]) if done.returncode == 0 and last else None


def answer_once() -> None:
    """Of the fresh process: open, answer one image, print the peak."""
    from compare.forms import open_form

    folder, form, threads = sys.argv[1:]
    if folder:
        predictor = open_form(Path(folder), form, threads=int(threads))
        predictor.probabilities(np.zeros((1, *predictor.view.size, 3), np.uint8))
    print(_peak_mb())


def _peak_mb() -> Any:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1]) / 1e6
    raise OSError("the system does not say how much memory was used at most")
