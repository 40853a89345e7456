"""What a new model changes against an old one on the same images, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compare.choose import paired
from compare.contract import Value
from shared_core.deploy.evaluate import Labelled
from shared_core.deploy.facts import ModelFacts


@dataclass(frozen=True)
class Change:
    """Two models on the same test images.

    Attributes:
        old, new: their accuracies.
        difference: new minus old, paired.
        gained, lost: images that only the new one, only the old one answers rightly.
        by_class: gained minus lost of each class that changed, the largest change first.
    """

    old: float
    new: float
    difference: Value
    gained: int
    lost: int
    by_class: tuple[tuple[str, int], ...]


def change(old: npt.NDArray[np.bool_], new: npt.NDArray[np.bool_], images: Labelled) -> Change:
    """What changed, from which images ``(N,)`` each answers rightly."""
    moved = new.astype(np.int64) - old
    sums = {name: int(moved[images.labels == k].sum()) for k, name in enumerate(images.classes)}
    ordered = sorted(((k, n) for k, n in sums.items() if n), key=lambda one: (-abs(one[1]), one[0]))
    gained, lost = int((moved > 0).sum()), int((moved < 0).sum())
    return Change(float(old.mean()), float(new.mean()), paired(new, old), gained, lost,
                  tuple(ordered))  # fmt: skip


def change_lines(
    old: Path, facts: ModelFacts, found: Change, images: int, times: Mapping[str, Any],
    sizes: Sequence[int], learned: int | None,
) -> list[str]:  # fmt: skip
    """For people.

    Args:
        times: ``old`` and ``new``, as :func:`compare.latency.measure` gives them at batch 1.
        sizes: bytes of the old one's files and of the new one's.
        learned: test images that the old one was trained with; None where nobody knows.
    """
    gap = found.difference
    verdict = "better" if gap.low > 0 else "worse" if gap.high < 0 else "no difference is shown"
    lines = [
        f"against {old} ({facts.architecture}) on the {images} test images: accuracy "
        f"{found.old:.4f} before, {found.new:.4f} now: {100 * gap.value:+.2f} points (paired 95 % "
        f"interval {100 * gap.low:+.2f} to {100 * gap.high:+.2f}), {verdict}",
        f"  only the new one is right on {found.gained} images, only the old one on {found.lost}",
        f"  {times['old']['1']['p50']:.2f} ms before, {times['new']['1']['p50']:.2f} ms now; "
        f"{sizes[0] / 1e6:.2f} MB before, {sizes[1] / 1e6:.2f} MB now",
    ]
    if found.by_class:
        told = ", ".join(f"{name} {n:+d}" for name, n in found.by_class[:5])
        lines.append(f"  classes that changed most, in images: {told}")
    if learned is None:
        lines.append("  whether the old one learned from some of these images is not known")
    elif learned:
        lines.append(f"  the old one learned from {learned} of these images, which flatters it")
    return lines
