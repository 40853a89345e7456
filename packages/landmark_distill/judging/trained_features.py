"""The floor: what features of a trained network, as they are, give on the same unseen classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from landmark_distill.config import TRAINED
from landmark_distill.images.truths import Truth
from landmark_distill.judging.judge import OpenSetResult, openset_test
from shared_core.datasets import ImageSet
from shared_core.for_torch.features import feature_function
from shared_core.for_torch.pretrained import start_network
from shared_core.metrics.trained_floor import image_features
from shared_core.runs.command import UsageError

NAME = "trained features"
NETWORK, CLASSES = "efficientnet_lite0", 1000
FARS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class TrainedFeatures:
    """What the floor's network gives without any training.

    Attributes:
        result: of the open-set test.
        start: where its weights are from.
        pixels: side of its input.
    """

    result: OpenSetResult
    start: Mapping[str, Any]
    pixels: int

    def facts(self) -> dict[str, Any]:
        """Plain JSON for records."""
        return {
            "network": NETWORK,
            "pixels": self.pixels,
            "start": dict(self.start),
            **fine_numbers(self.result),
            "open_set": self.result.as_dict(),
        }


def trained_features(
    images: ImageSet,
    truths: Mapping[str, Truth],
    *,
    pixels: int,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> TrainedFeatures | str:
    """Test the plain features of EfficientNet-lite0 as a student's are tested; the core's view.

    Args:
        pixels: side of its input; at least 32.

    Returns:
        The floor, or a line that says why there is none.
    """
    try:
        network = start_network(NETWORK, init=TRAINED, num_classes=CLASSES)
    except UsageError as error:
        return f"no floor of {NAME}: {error}"
    side = max(pixels, 32)
    run = feature_function(network, num_classes=CLASSES, device=device)
    rows = image_features(
        run, images, input_size=side, batch_size=32, threads=threads, label=f"{NAME}, test images"
    )
    result = openset_test(rows, truths, far_targets=FARS, curve=True)
    return TrainedFeatures(result, network.start, side)


def fine_numbers(result: OpenSetResult) -> dict[str, float]:
    """What a student is held to the floor by: recall@1 and, where pairs suffice, VR at FAR 0.01.

    Fractions, of the fine classes or, where they are not tested, of the coarse ones.
    """
    truth = next((name for name in ("fine", "coarse") if name in result.rates), "fine")
    found: dict[str, float] = {}
    if truth in result.retrieval:
        found["recall_at_1"] = result.retrieval[truth].recall[1]
    far = result.far_targets.index(1e-2) if 1e-2 in result.far_targets else None
    if far is not None and result.measurable[truth][far]:
        found["vr_0.01"] = result.rates[truth][far]
    return found


def verdict(student: Mapping[str, float | None], floor: TrainedFeatures) -> str:
    """One line: a student's numbers beside the floor's, and whether it lies below."""
    theirs = fine_numbers(floor.result)
    pairs = [(name, student[name], value) for name, value in theirs.items() if student.get(name)
             is not None]  # fmt: skip
    said = ", ".join(f"{name} {ours:.4f} against {value:.4f}" for name, ours, value in pairs)
    where = f"{NAME} ({NETWORK} as it is, {floor.pixels} px)"
    below = [name for name, ours, value in pairs if ours < value]
    if below:
        return f"BELOW {where} in {' and '.join(below)}: {said}"
    return f"not below {where}: {said}"
