"""How long networks take: an image's share of a batch's time, all contestants in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfnet_dynn.run import Run, pairs

TIMED_IMAGES, ROUNDS = 256, 5
BATCHES = ((1, 64), (64, TIMED_IMAGES))  # batch size, and how many of the images it is tried on
Call = Callable[[Tensor], Any]


def timed_images(run: Run) -> Tensor:
    """Up to ``TIMED_IMAGES`` test images, spread over the classes, decoded once: ``(M, 3, H, W)``.

    Only they are read: a test set may be larger than memory.
    """
    total = len(run.data.image_set("test"))
    rows = np.sort(np.random.default_rng(0).permutation(total)[:TIMED_IMAGES])
    found = [batch for batch, _ in pairs(run.loaders().held("test", rows=rows), "timed images")]
    return torch.cat(found).contiguous()


def times_of(calls: dict[str, Call], images: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds an image of each call, by ``batch 1`` and ``batch 64``."""
    return {
        f"batch {batch}": time_per_image(calls, images[:count], batch=batch)
        for batch, count in BATCHES
    }


def time_per_image(
    calls: dict[str, Call], images: Tensor, *, batch: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """Milliseconds an image of each call, taken in turns, median over the rounds.

    On a CPU one thread computes and its CPU time counts: waiting for other threads, or for other
    programs of a shared machine, is not the model's cost. On a GPU it is the time on the clock.

    Args:
        calls: by name: a function of a batch ``(N, 3, H, W)``.
        images: ``(M, 3, H, W)``, decoded and on the device.
        batch: images a call.
    """
    on_gpu = images.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time

    def once(call: Call) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        for first in range(0, len(images), batch):
            call(images[first : first + batch])
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / len(images) * 1e3

    times: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for call in calls.values():
                call(images[:batch])
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(once(call))
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(values)) for name, values in times.items()}
