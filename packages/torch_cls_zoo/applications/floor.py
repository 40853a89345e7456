"""The floors: what linear classifiers reach, on a trained network's features and on plain ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.metrics.floor import floor_accuracy
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.trained_floor import NAME, TrainedFloor, trained_floor
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import TRAINED, how_to_get, installed_file

LARGEST = 50_000  # training images for which it is measured without being asked for
SIDE = 224  # pixels, at most
NETWORK = CATALOGUE[0]


@dataclass(frozen=True)
class Floors:
    """What linear classifiers reach on the test part, without training a network.

    Attributes:
        plain: fractions by kind of features of the image itself, ``plain`` and ``engineered``.
        trained: on features of a trained network; None where its weights are not here.
    """

    plain: Mapping[str, float]
    trained: TrainedFloor | None

    def facts(self) -> dict[str, Any]:
        """Plain JSON for records."""
        return {**self.plain, **({NAME: self.trained.facts()} if self.trained else {})}

    def verdict(self, test: Mapping[str, Any]) -> str:
        """One line: the test accuracy with its interval beside the floors, and whether it is below.

        Args:
            test: ``accuracy``, a fraction, and ``images``.
        """
        low, high = wilson_interval(round(test["accuracy"] * test["images"]), test["images"])
        best = max(self.plain, key=lambda name: self.plain[name])
        name, value, ends = f"{best} features, linear", self.plain[best], ""
        if self.trained is not None:
            name, value = NAME, self.trained.accuracy
            ends = f" [{self.trained.low:.4f}, {self.trained.high:.4f}]"
        without = f"; without a network {self.plain[best]:.4f}" if self.trained else ""
        return (
            f"test accuracy {test['accuracy']:.4f} [{low:.4f}, {high:.4f}] is "
            f"{'BELOW' if test['accuracy'] < value else 'not below'} the floor ({name}) of "
            f"{value:.4f}{ends}{without}"
        )


def wants_floors(data: PreparedData, asked: bool | None) -> bool:
    """Whether to measure them: as asked, or on real images that are not too many."""
    few = len(data.manifest.subset("train")) <= LARGEST
    return asked if asked is not None else few and not data.rehearsal


def measure_floors(
    data: PreparedData,
    *,
    side: int,
    threads: int | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Floors:
    """Fitted on train, judged on test; the strength of the trained one's penalty chosen on val.

    Args:
        side: of the images that the run shows its network, pixels; larger ones are shown at 224.
        threads: that decode.
        say: told how to get the trained network's weights where they are not here.
    """
    train, test = data.image_set("train"), data.image_set("test")
    plain = floor_accuracy(train.paths, train.labels, test.paths, test.labels)
    if installed_file(NETWORK) is None:
        say(f"no floor of trained features: get the network by {how_to_get(NETWORK)}")
        return Floors(plain, None)
    from shared_core.for_torch.features import feature_function
    from shared_core.for_torch.pretrained import start_network

    classes = len(data.classes)
    network = start_network(NETWORK.name, init=TRAINED, num_classes=classes)
    trained, _probe = trained_floor(
        feature_function(network, num_classes=classes, device=device),
        [train, data.image_set("calibration"), test],
        num_classes=classes,
        network=NETWORK.name,
        input_size=min(SIDE, side),
        threads=threads,
    )
    return Floors(plain, trained)
