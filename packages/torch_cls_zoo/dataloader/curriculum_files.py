"""The weight of each training image, from how sure a model was of it: ``curriculum.txt``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torch_cls_zoo.dataloader.sample_files import read_sample_file, rows_for, write_sample_file

CURRICULUM_FILE = "curriculum.txt"


def curriculum_weights(
    probability: np.ndarray, thresholds: Sequence[float], weights: Sequence[float]
) -> np.ndarray:
    """The weight of the first threshold that each probability is above; NaN below all.

    Args:
        probability: of the true class, ``(N,)``, in [0, 1].
        thresholds: falling.
        weights: as many, at least 0.

    Raises:
        ValueError: thresholds that do not fall, another number of weights, a negative weight.
    """
    if len(thresholds) != len(weights) or not thresholds:
        raise ValueError(
            f"{len(thresholds)} curriculum thresholds and {len(weights)} weights, expected as "
            "many of each and at least one"
        )
    if any(b >= a for a, b in zip(thresholds, thresholds[1:], strict=False)):
        raise ValueError(f"curriculum thresholds are {list(thresholds)}, expected them to fall")
    if min(weights) < 0:
        raise ValueError(f"curriculum weights are {list(weights)}, expected at least 0")
    found = np.full(len(probability), np.nan)
    for threshold, weight in zip(reversed(thresholds), reversed(weights), strict=True):
        found[np.asarray(probability) > threshold] = weight
    return found


def write_curriculum(
    folder: Path, paths: Sequence[str], weights: np.ndarray, *, about: Mapping[str, Any]
) -> Path:
    """Write ``curriculum.txt``; images below all thresholds (NaN) are left out of it.

    Raises:
        ValueError: no image is above the lowest threshold.
    """
    kept = np.flatnonzero(~np.isnan(weights))
    if not len(kept):
        raise ValueError("no image is above the lowest curriculum threshold; lower it")
    path = folder / CURRICULUM_FILE
    write_sample_file(
        path, [paths[n] for n in kept], weights[kept][:, None], about={**about, "what": "weights"}
    )
    return path


def read_curriculum(folder: Path, paths: Sequence[str]) -> np.ndarray:
    """The weight of each image, float32 ``(N,)``; 0 for those that the file leaves out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a weight below 0, or a file that has none of the images.
    """
    path = folder / CURRICULUM_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; write it by --make_curriculum train --resume WEIGHTS"
        )
    read = read_sample_file(path, columns=1, known=paths)
    if read.values.min() < 0:
        raise ValueError(f"{path}: a weight is {read.values.min():g}, expected at least 0")
    rows = rows_for(read, paths)
    if not (rows >= 0).any():
        raise ValueError(f"{path}: has none of the {len(paths)} training images")
    weights = np.zeros(len(paths), np.float32)
    weights[rows >= 0] = read.values[rows[rows >= 0], 0]
    if not weights.any():
        raise ValueError(f"{path}: every weight is 0, expected some above")
    return weights
