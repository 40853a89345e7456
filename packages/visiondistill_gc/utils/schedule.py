"""The learning rate: a straight rise, then half a cosine; by epoch as the original, or by step."""

from __future__ import annotations

import math

KINDS = ("epoch", "step")


def learning_rate(
    epoch: float, *, base: float, epochs: int, warmup: int, kind: str = "epoch"
) -> float:
    """The rate at a time of the run.

    ``epoch``: ``base * (e + 1) / warmup`` while the epoch ``e`` (from 0) is below ``warmup``, then
    ``base / 2 * (1 + cos(pi * (e - warmup) / (epochs - warmup)))``; constant within an epoch. It is
    the original's rule. ``step``: the same with the epoch as a fraction, and a rise from
    ``base * t / warmup``, so that short runs have no jumps.

    Args:
        epoch: epochs done, a fraction within one.
        base: highest rate, above 0.
        epochs: of the whole run.
        warmup: epochs of rising rate, below ``epochs``.
        kind: ``epoch`` or ``step``.

    Raises:
        ValueError: a value out of range.
    """
    if not base > 0 or not 0 <= warmup < epochs or kind not in KINDS:
        raise ValueError(
            f"base {base}, warm-up {warmup} of {epochs} epochs by {kind!r}: expected a rate above "
            "0, a warm-up shorter than the run, by epoch or step"
        )
    if kind == "epoch":
        epoch = math.floor(epoch)
        if epoch < warmup:
            return base * (epoch + 1) / warmup
    elif epoch < warmup:
        return base * epoch / warmup
    return base / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
