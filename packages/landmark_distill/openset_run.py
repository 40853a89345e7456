"""The test at the end of a run: ``opensetFeat.npy`` of the unseen classes, and what it shows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from landmark_distill.features import FEATURE_FILE, Sight, extract_features, load_features
from landmark_distill.landmark_data import LandmarkData
from landmark_distill.model import EmbeddingModel
from landmark_distill.openset import OpenSetResult, openset_test, write_results
from shared_core.for_torch.precision import Precision


def test_network(
    model: EmbeddingModel,
    data: LandmarkData,
    folder: Path,
    *,
    args: argparse.Namespace,
    device: torch.device,
    weights: str,
) -> OpenSetResult:
    """Embed the test images, row by row in their order, and verify all pairs.

    Writes ``opensetFeat.npy`` and ``openset.json`` into ``folder``.

    Args:
        model: in eval mode, on ``device``.
        weights: sha256 of the network's weights.
    """
    precision = Precision(device, args.amp)

    def embed(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), precision.autocast():
            return model.embed(images)

    found = extract_features(
        embed,
        data.test,
        folder / FEATURE_FILE,
        sight=Sight(args.image_size, bgr=args.bgr, resize=args.resize),
        width=model.feature_dim,
        weights=weights,
        batch_size=max(args.batch_size, 16),
        threads=args.num_workers,
        device=device,
    )
    result = openset_test(load_features(found.path), {"coarse": data.coarse, "fine": data.fine})
    about: dict[str, Any] = {"features": FEATURE_FILE, "images": len(data.test)}
    write_results(folder, result, more=about)
    return result
