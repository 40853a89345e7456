"""The learning rate of every step: warm-up, then cosine, steps or milestones, as pure functions.

``original`` is what the original's runs used: epochs count from 1, the warm-up starts within epoch
1 at ``lr / warmup``, and the cosine's period is ``max_epoch`` although it starts only after the
warm-up. So a run with warm-up never reaches ``min_lr`` (5.98e-6 instead of 1e-6 in the Swin-tiny
recipe), and a run without one touches it an epoch early and rises again (to 1.64e-5 in the ResNet12
recipe). ``corrected`` counts the progress from 0 to 1: it rises from ``lr / steps of the warm-up``
and ends at ``min_lr``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULERS = ("multistep", "step", "cosine")
COSINES = ("original", "corrected")


def parse_milestones(text: str) -> tuple[int, ...]:
    """``20`` or ``10,20,30`` as rising epoch numbers.

    Raises:
        ValueError: not whole numbers of at least 1 that rise.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if (
        not numbers
        or numbers[0] < 1
        or any(b <= a for a, b in zip(numbers, numbers[1:], strict=False))
    ):
        raise ValueError(f"step size {text!r}, expected epochs such as 20 or 10,20,30, rising")
    return numbers


@dataclass(frozen=True)
class Schedule:
    """A run's learning rate.

    Attributes:
        kind: ``cosine``; ``step``: times gamma every ``steps[0]`` epochs; ``multistep``: times
            gamma after each of ``steps`` epochs.
        lr, min_lr: highest and lowest rate; ``min_lr`` is for the cosine.
        max_epoch, warmup: epochs; the warm-up may be 0 and comes before any kind.
        steps, gamma: see ``kind``.
        cosine: ``original`` or ``corrected``.
    """

    kind: str
    lr: float
    min_lr: float
    max_epoch: int
    warmup: int = 0
    steps: tuple[int, ...] = (20,)
    gamma: float = 0.5
    cosine: str = "original"

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULERS:
            raise ValueError(f"schedule {self.kind!r}, expected one of {', '.join(SCHEDULERS)}")
        if self.cosine not in COSINES:
            raise ValueError(f"cosine {self.cosine!r}, expected one of {', '.join(COSINES)}")
        if self.kind == "step" and len(self.steps) != 1:
            raise ValueError(f"step size {self.steps}, expected one; multistep takes several")
        if not 0 <= self.warmup <= self.max_epoch:
            raise ValueError(
                f"warm-up of {self.warmup} epochs in a run of {self.max_epoch}: expected fewer"
            )
        if self.kind == "cosine" and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} above lr {self.lr:g}: expected lower")

    def at(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """The rate of one step.

        Args:
            epoch: from 0.
            step: of the epoch, from 0.
            steps_per_epoch: of a whole epoch.
        """
        if self.cosine == "corrected":
            done = epoch + (step + 1) / steps_per_epoch  # epochs, this step included
            if done <= self.warmup:
                return self.lr * done / self.warmup
            done = epoch + step / steps_per_epoch
            if self.kind != "cosine":
                return self._stepped(epoch)
            rest = self.max_epoch - self.warmup
            last = rest - 1 / steps_per_epoch  # so that the last step has min_lr
            progress = (done - self.warmup) / last if last > 0 else 1.0
            return self._half_cosine(progress)
        e = epoch + 1 + step / steps_per_epoch
        if e < self.warmup:
            return self.lr * e / self.warmup
        if self.kind != "cosine":
            return self._stepped(epoch)
        return self._half_cosine((e - self.warmup) / self.max_epoch)

    def _half_cosine(self, progress: float) -> float:
        half = 0.5 * (self.lr - self.min_lr)
        return self.min_lr + half * (1 + math.cos(math.pi * progress))

    def _stepped(self, epoch: int) -> float:
        """The rate in a whole epoch, counted from 0, of ``step`` and ``multistep``."""
        if self.kind == "step":
            return self.lr * self.gamma ** (epoch // self.steps[0])
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.steps)
