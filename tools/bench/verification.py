"""Verification rates over all pairs, block by block, against the whole matrix of scores at once.

Random unit features in clusters, labels coarse and fine, eight false-accept rates. The other side
is what a short script does: the product of all features with all, ``triu_indices``, sorting. One
thread and its CPU time, by turns. Memory is the peak of a process of its own less what it held
before. The last rows are the full size of the landmark test, 37,649 features, where the matrix
does not fit; they stand against one product of each pair, the least that any exact way can do.

    python tools/bench/verification.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.judging.verification import verification_rates
from shared_core.runs import write_benchmark

WIDTH, BLOCK = 1024, 1024
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
FULL, PER_CLASS = 37_649, 10  # features and images of a landmark in the project's test
ALLOWED_GIB = 2.0
SIDES = ("ours", "matrix", "product")
Rates = dict[str, NDArray[np.float64]]


def features(count: int) -> tuple[NDArray[np.float32], dict[str, NDArray[np.int64]]]:
    """Unit rows in loose clusters, and two truths."""
    rng = np.random.default_rng(0)
    fine = np.arange(count) // PER_CLASS
    rows = rng.standard_normal((count, WIDTH), dtype=np.float32)
    centres = rng.standard_normal((fine[-1] + 1, WIDTH), dtype=np.float32)
    for label in range(fine[-1] + 1):  # no second copy of all rows
        rows[label * PER_CLASS : (label + 1) * PER_CLASS] += 0.3 * centres[label]
    for start in range(0, count, 4096):
        part = rows[start : start + 4096]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows, {"coarse": fine // 3, "fine": fine}


def ours(rows: NDArray[np.float32], truths: dict[str, NDArray[np.int64]]) -> Rates:
    """Block by block."""
    found = verification_rates(rows, truths, far_targets=FARS, block=BLOCK)
    return {name: one.rates for name, one in found.items()}


def matrix(rows: NDArray[np.float32], truths: dict[str, NDArray[np.int64]]) -> Rates:
    """All scores at once."""
    i, j = np.triu_indices(len(rows), 1)
    scores = (rows @ rows.T)[i, j]
    found = {}
    for name, labels in truths.items():
        same = labels[i] == labels[j]
        good, bad = scores[same], np.sort(scores[~same])[::-1]
        limits = [bad[int(far * len(bad) + 1e-9)] for far in FARS]
        found[name] = np.array([np.mean(good > limit) for limit in limits])
    return found


def product(rows: NDArray[np.float32], truths: dict[str, NDArray[np.int64]]) -> Rates:
    """One product of each pair, and nothing done with it."""
    for i in range(0, len(rows), BLOCK):
        for j in range(i, len(rows), BLOCK):
            rows[i : i + BLOCK] @ rows[j : j + BLOCK].T
    return {}


def timed(run: Callable[..., Rates], *arguments: Any) -> tuple[float, Rates]:
    """CPU seconds of this thread, and the answer."""
    start = time.thread_time()
    found = run(*arguments)
    return time.thread_time() - start, found


def child(side: str, count: int) -> dict[str, Any]:
    """One side in a process of its own: seconds, MiB at the peak, MiB above the inputs."""
    command = [sys.executable, __file__, "--child", side, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def memory(which: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {which}, expected Linux")


def restart_peak() -> float:
    """Forget the peak so far, that of making the features; returns the MiB held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


def run_child(side: str, count: int) -> None:
    """What :func:`child` starts."""
    rows, truths = features(count)
    before = restart_peak()
    seconds, found = timed({"ours": ours, "matrix": matrix, "product": product}[side], rows, truths)
    peak = memory("VmHWM")
    rates = {name: values.tolist() for name, values in found.items()}
    said = {"seconds": seconds, "peak_mib": peak, "extra_mib": max(peak - before, 0.1)}
    print(json.dumps({**said, "rates": rates}))


def row(
    name: str, mine: list[float], other: list[float], *, unit: str, goal: float | None, equal: str
) -> dict[str, Any]:
    """A line of the record."""
    ratios = sorted(b / a for a, b in zip(mine, other, strict=True))
    median = round(statistics.median(ratios), 3)
    made = {
        "name": name,
        "ours": round(statistics.median(mine), 4),
        "theirs": round(statistics.median(other), 4),
        "unit": unit,
        "ratio_median": median,
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "goal": goal,
        "met": None if goal is None else median >= goal,
        "skipped": None,
        "equal": equal,
    }
    verdict = "" if goal is None else f"  goal {goal:g}: {'met' if made['met'] else 'not met'}"
    print(
        f"{name:<52}{made['ours']:>10.3f}{made['theirs']:>10.3f} {unit:<4}{median:7.2f}x{verdict}",
        flush=True,
    )
    return made


def compare(count: int, rounds: int) -> list[dict[str, Any]]:
    """Time and memory where the matrix fits."""
    rows, truths = features(count)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        seconds, mine = timed(ours, rows, truths)
        times["ours"].append(seconds)
        seconds, other = timed(matrix, rows, truths)
        times["matrix"].append(seconds)
        times["product"].append(timed(product, rows, truths)[0])
    genuine = {name: len(matrix_pairs(labels)) for name, labels in truths.items()}
    off = max(float(np.abs(mine[name] - other[name]).max() * genuine[name]) for name in truths)
    if off > 1.5:
        raise ValueError(f"{count}: rates differ by {off:.1f} genuine pairs, expected 1 at most")
    equal = f"rates of both truths within {off:.0f} genuine pairs (float64 against float32 scores)"
    size = f"{count:,} features"
    made = [
        row(f"{size}: against the whole matrix", times["ours"], times["matrix"], unit="s", goal=3,
            equal=equal),
        row(f"{size}: against one product of each pair", times["ours"], times["product"],
            unit="s", goal=None, equal="the least that an exact way can do; no rates"),
    ]  # fmt: skip
    mine_child, other_child = child("ours", count), child("matrix", count)
    made.append(
        row(f"{size}: memory above the features", [mine_child["extra_mib"]],
            [other_child["extra_mib"]], unit="MiB", goal=3, equal=equal)
    )  # fmt: skip
    return made


def matrix_pairs(labels: NDArray[np.int64]) -> range:
    """As many entries as there are genuine pairs."""
    sizes = np.bincount(labels)
    return range(int((sizes * (sizes - 1) // 2).sum()))


def full_size() -> list[dict[str, Any]]:
    """The landmark test's own size."""
    mine, least = child("ours", FULL), child("product", FULL)
    pairs = FULL * (FULL - 1) // 2
    equal = (
        f"{pairs:,} pairs, 8 FARs, 2 truths; fine "
        + ", ".join(f"{rate:.5f}" for rate in mine["rates"]["fine"])
        + "; coarse "
        + ", ".join(f"{rate:.5f}" for rate in mine["rates"]["coarse"])
    )
    made = [
        row(f"{FULL:,} features: against one product of each pair", [mine["seconds"]],
            [least["seconds"]], unit="s", goal=None, equal=equal),
        row(f"{FULL:,} features: peak of the process in the {ALLOWED_GIB:g} GiB allowed",
            [mine["peak_mib"] / 1024], [ALLOWED_GIB], unit="GiB", goal=1,
            equal="features, interpreter and all; the same run"),
    ]  # fmt: skip
    made[0]["rates"] = mine["rates"]
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer features, not the full size")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 3; quick 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        run_child(options.child[0], int(options.child[1]))
        return 0
    rounds = options.rounds or (1 if options.quick else 3)
    rows = []
    for count in (4000,) if options.quick else (4000, 8000):
        rows += compare(count, rounds)
    if not options.quick:
        rows += full_size()
    if options.json:
        write_benchmark(options.json, topic="verification", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
