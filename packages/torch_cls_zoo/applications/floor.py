"""The floor: what a linear classifier on a trained network's features reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.trained_floor import NAME, TrainedFloor, trained_floor
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import TRAINED, how_to_get, installed_file

LARGEST = 50_000  # training images for which it is measured without being asked for
SIDE = 224  # pixels, at most
NETWORK = CATALOGUE[0]


def wanted_floor(data: PreparedData, asked: bool | None, say: Callable[[str], None]) -> bool:
    """Whether to measure it: as asked, or on real images, not too many, where the weights are."""
    few = len(data.manifest.subset("train")) <= LARGEST
    wanted = asked if asked is not None else few and not data.rehearsal
    if wanted and installed_file(NETWORK) is None:
        say(f"no floor of trained features: get the network by {how_to_get(NETWORK)}")
        return False
    return wanted


def measure_floor(
    data: PreparedData, *, side: int, threads: int | None, device: torch.device
) -> TrainedFloor:
    """Fitted on train, its strength chosen on val, judged on test.

    Args:
        side: of the images that the run shows its network, pixels; larger ones are shown at 224.
        threads: that decode.
    """
    from shared_core.for_torch.features import feature_function
    from shared_core.for_torch.pretrained import start_network

    classes = len(data.classes)
    network = start_network(NETWORK.name, init=TRAINED, num_classes=classes)
    return trained_floor(
        feature_function(network, num_classes=classes, device=device),
        [data.image_set(name) for name in ("train", "calibration", "test")],
        num_classes=classes,
        network=NETWORK.name,
        input_size=min(SIDE, side),
        threads=threads,
    )[0]


def verdict(test: Mapping[str, Any], floor: TrainedFloor) -> str:
    """One line: the test accuracy with its interval beside the floor, and whether it is below."""
    low, high = wilson_interval(round(test["accuracy"] * test["images"]), test["images"])
    below = test["accuracy"] < floor.accuracy
    return (
        f"test accuracy {test['accuracy']:.4f} [{low:.4f}, {high:.4f}] is "
        f"{'BELOW' if below else 'not below'} the floor ({NAME}) of {floor.accuracy:.4f} "
        f"[{floor.low:.4f}, {floor.high:.4f}]"
    )
