"""The floor of trained features: what stored features of a trained network and a line reach.

No network is trained for it; it takes a minute. A recipe that ends below has not paid for itself.
The network itself is the framework's business: it hands in a function from views to features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.datasets import BatchLoader, EvalView, ImageSet
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.runs.progress import progress

NAME = "trained features, linear"
Features = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (N, H, W, 3) to (N, D)


@dataclass(frozen=True)
class TrainedFloor:
    """What a linear classifier on trained features gives.

    Attributes:
        accuracy: on the judging images, a fraction; ``low``, ``high`` its 95 % interval (Wilson).
        images: how many judged.
        network: whose features.
        input_size: side in pixels.
        strength: of the classifier's penalty, chosen on images that neither fit nor judge.
    """

    accuracy: float
    low: float
    high: float
    images: int
    network: str
    input_size: int
    strength: float

    def facts(self) -> dict[str, Any]:
        """Plain JSON for records."""
        return asdict(self)


def image_features(
    features: Features,
    images: ImageSet,
    *,
    input_size: int,
    batch_size: int = 64,
    threads: int | None = None,
    label: str = "features",
) -> NDArray[np.float32]:
    """Features ``(N, D)`` of every image, in order, of the view that evaluation takes.

    Args:
        input_size: side of the square view, pixels.
    """
    loader = BatchLoader(
        images,
        view=EvalView(input_size, resize_ratio=1.0, method="area"),
        batch_size=batch_size,
        threads=threads,
    )
    total = -(-len(images) // batch_size)
    return np.concatenate([features(b.images) for b in progress(loader, total=total, label=label)])


def trained_floor(
    features: Features,
    parts: Sequence[ImageSet],
    *,
    num_classes: int,
    network: str,
    input_size: int,
    threads: int | None = None,
) -> tuple[TrainedFloor, LinearProbe]:
    """Fit on the first part, choose on the second, judge on the third.

    Args:
        parts: train, calibration and test images.
        network: for the record.
    """
    names = ("training", "calibration", "test")
    found = [
        image_features(
            features, part, input_size=input_size, threads=threads, label=f"features, {name} images"
        )
        for part, name in zip(parts, names, strict=True)
    ]
    train, choose, judge = parts
    probe = fit_probe(
        found[0],
        train.labels,
        num_classes=num_classes,
        validation=(found[1], choose.labels) if len(choose) else None,
    )
    right = probe.accuracy(found[2], judge.labels)
    low, high = wilson_interval(round(right * len(judge)), len(judge))
    return (
        TrainedFloor(right, low, high, len(judge), network, input_size, probe.strength),
        probe,
    )
