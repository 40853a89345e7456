"""The global filter in the form that ``auto`` picks against ``rfft2``, per token grid and batch.

Same parameter, same input, float32, 384 channels, one thread; both are timed by the thread's CPU
time, alternating, so that other work on the machine touches both. Ratios are rfft2 over ours.

    python tools/bench/filter.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]

import torch

from gfnet_dynn.models.global_filter import GlobalFilter
from shared_core.runs import write_benchmark

CHANNELS = 384
SAME = 0.97  # goal where auto is rfft2 itself: the ratio is timer noise around 1
GRIDS = {4: 1.0, 8: 2.0, 14: 1.0, 16: 1.0, 20: 1.0, 37: 2.0, 40: 1.0, 64: SAME}  # side: goal
BATCHES = {False: (1, 32), True: (1, 8)}  # quick
LARGE = 8  # images at most, from 37 x 37 tokens on


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of this thread for one call."""
    start = time.thread_time()
    for _ in range(repeats):
        run()
    return (time.thread_time() - start) / repeats


def runner(layer: GlobalFilter, x: torch.Tensor, *, train: bool) -> Callable[[], Any]:
    """One forward of ``layer``, or one forward and backward."""
    if not train:

        def forward() -> None:
            with torch.inference_mode():
                layer(x)

        return forward
    x = x.clone().requires_grad_()
    toward = torch.ones_like(x)
    return lambda: layer(x).backward(toward)


def compare(side: int, batch: int, *, train: bool, rounds: int) -> dict[str, Any]:
    """One row: time both forms, and hold them to each other."""
    torch.manual_seed(0)
    ours = GlobalFilter(CHANNELS, (side, side), form="auto")
    theirs = GlobalFilter(CHANNELS, (side, side), form="fft")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(batch, side * side, CHANNELS)
    with torch.no_grad():
        reference = theirs(x)
        worst = ((ours(x) - reference).abs().max() / reference.abs().max()).item()
    if worst > 1e-5:
        raise ValueError(f"{side}x{side}: the forms differ by {worst:.1e} of the largest output")
    runs = (runner(ours, x, train=train), runner(theirs, x, train=train))
    repeats = max(1, int(0.02 / max(seconds(runs[1], 1), 1e-6)))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for kept, run in zip(times, runs, strict=True):
            took = seconds(run, repeats)
            if number:
                kept.append(took)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    median, goal = (
        round(statistics.median(ratios), 3),
        min(GRIDS[side], 1.0) if train else GRIDS[side],
    )
    return {
        "name": f"{side}x{side}, batch {batch}, {'training' if train else 'inference'}",
        "chosen": ours.chosen,
        "ours": round(statistics.median(times[0]) * 1e3, 4),
        "theirs": round(statistics.median(times[1]) * 1e3, 4),
        "unit": "ms",
        "ratio_median": median,
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "goal": goal,
        "met": median >= goal,
        "skipped": None,
        "equal": f"within {worst:.0e} of the largest output",
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 9; quick 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 9)
    torch.set_num_threads(1)
    rows = []
    for train in (False, True):
        for side in GRIDS:
            for batch in BATCHES[options.quick]:
                row = compare(
                    side, min(batch, LARGE if side >= 37 else 64), train=train, rounds=rounds
                )
                rows.append(row)
                verdict = f"  goal {row['goal']:g}: {'met' if row['met'] else 'not met'}"
                print(
                    f"{row['name']:<30}{row['chosen']:<10}{row['ours']:>9.3f}{row['theirs']:>10.3f}"
                    f" ms {row['ratio_median']:6.2f}x ({row['ratio_min']:.2f} to "
                    f"{row['ratio_max']:.2f}){verdict}",
                    flush=True,
                )
    if options.json:
        write_benchmark(options.json, topic="filter", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
