"""From an embedding to a classifier: the nearest class mean, as a layer with a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from landmark_distill.config import HoldOut
from landmark_distill.feature_layer import class_directions
from landmark_distill.head.cosine_head import SCALE
from landmark_distill.images.two_level import scan_levels, split_levels
from shared_core.datasets import BatchLoader, ImageSet, Manifest
from shared_core.datasets.finding.verify import verify
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.predictor import Predictor
from shared_core.metrics.calibration import fit_temperature
from shared_core.runs.command import UsageError

CALIBRATION = 0.2  # share of a folder's images that fits the temperature


class NearestMean(nn.Module):
    """Normalised images to cosines ``(N, K)`` of features and class means, times 32."""

    def __init__(self, encoder: nn.Module, means: NDArray[np.float64]) -> None:
        super().__init__()
        self.encoder = encoder
        self.means = nn.Linear(means.shape[1], len(means), bias=False)
        with torch.no_grad():
            self.means.weight.copy_(torch.from_numpy(means))

    def forward(self, images: Tensor) -> Tensor:
        return self.means(nn.functional.normalize(self.encoder(images), dim=1))


@dataclass(frozen=True)
class ClassImages:
    """Images of classes: the means come from ``train``; ``calibration`` fits the temperature.

    Attributes:
        names: of the classes that have training images; labels are places in it.
        parts: images by part: train, calibration, and test where the split has one.
        split_hash: of what lies where.
    """

    names: tuple[str, ...]
    parts: dict[str, ImageSet]
    split_hash: str


def class_images(source: Path, data_path: Path | None) -> ClassImages:
    """The images of a class folder, every fifth for calibration, or those of a split's parts.

    Args:
        source: a folder ``class/image`` or ``coarse/fine/image``, or a split's manifest.
        data_path: the folder that a manifest's paths start from.

    Raises:
        UsageError: a manifest without ``data_path``, or without images to fit on.
        DatasetError: no images.
    """
    if source.is_dir():
        root = source
        listing, coarse = scan_levels(source)
        report = verify(listing, near=False, workers=0)
        hold_out = HoldOut(test=0.0, calibration=CALIBRATION)
        manifest = split_levels(
            listing, coarse, keys=report.keys, hold_out=hold_out, quarantine=report.quarantine()
        )
    elif data_path is None:
        raise UsageError(f"--class-means {source}: expected --data-path, where its images lie")
    else:
        root, manifest = data_path, Manifest.read(source, root=data_path)
    labels = sorted({entry.label for entry in manifest.entries if entry.split == "train"})
    place = {label: row for row, label in enumerate(labels)}
    parts = {}
    for name in ("train", "calibration", "test"):
        items = manifest.subset(name) if name in manifest.splits else []
        known = [item for item in items if item.label in place]
        if known:
            parts[name] = ImageSet([root / i.path for i in known], [place[i.label] for i in known])
    if len(labels) < 2 or "calibration" not in parts:
        raise UsageError(
            f"--class-means {source}: {len(labels)} classes with training images and "
            f"{len(parts.get('calibration', ()))} calibration images, expected two or more classes "
            "and some images that fit the temperature"
        )
    return ClassImages(tuple(manifest.classes[n] for n in labels), parts, manifest.hash)


def nearest_mean(
    network: Predictor, images: ClassImages, *, batch: int
) -> tuple[NDArray[np.float64], ModelFacts]:
    """Means of the classes ``(K, F)``, each as long as a head's scale, and the classifier's facts.

    Args:
        network: gives features of length 1.
        batch: images asked together.
    """

    def features(part: str) -> NDArray[np.float64]:
        loader = BatchLoader(images.parts[part], view=network.view, batch_size=batch, threads=2)
        found = [np.asarray(network.probabilities(one.images), np.float64) for one in loader]
        return np.concatenate(found)

    learned = images.parts["train"]
    means = SCALE * class_directions(features("train"), learned.labels, count=len(images.names))
    held = images.parts["calibration"]
    temperature = fit_temperature(features("calibration") @ means.T, held.labels)
    more: dict[str, Any] = {**network.facts.more, "class_means": len(learned)}
    facts = network.facts.replaced(
        task="classify",
        activation="softmax",
        class_names=images.names,
        temperature=temperature,
        provenance={**network.facts.provenance, "class_means_split": images.split_hash},
        more=more,
    )
    return means, facts
