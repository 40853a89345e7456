"""The floor: what image features and a linear classifier reach on the same split, no network.

A network that does not beat this has learned nothing worth its cost. Two sets of features:

- ``plain``: an 8 x 8 colour thumbnail, a histogram of each colour channel, and gradient energy by
  direction on a 4 x 4 grid.
- ``engineered``: these, and a joint colour histogram and gradient histograms (strength and
  direction) at three scales, the kind of texture statistic that suits images from above.

The classifier is scikit-learn's logistic regression on standardised features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from shared_core.datasets.reading.decode import decode
from shared_core.runs import progress

THUMBNAIL, CELLS, DIRECTIONS, STRENGTHS, CHANNEL_BINS = 8, 4, 9, 8, 16
SCALES = (128, 64, 32)  # pixels, of the texture histograms
GRID_SIZE = 64  # pixels, of the gradient grid
MAX_ENERGY = 1500.0  # a Sobel response hardly gets beyond it


def _share(histogram: np.ndarray) -> np.ndarray:
    """Square roots of shares (Hellinger map): large bins count less."""
    return np.sqrt(histogram / max(float(histogram.sum()), 1e-6))


def _gradients(grey: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Energy and direction bin of each pixel of a grey image, resized to ``size`` pixels."""
    small = cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA)
    dx, dy = cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
    turn = (np.arctan2(dy, dx) % np.pi) / np.pi * DIRECTIONS
    return np.hypot(dx, dy), np.minimum(turn.astype(int), DIRECTIONS - 1)


def plain_features(image: np.ndarray) -> np.ndarray:
    """``plain`` features of a uint8 RGB image ``(H, W, 3)``: float32 ``(384,)`` in ``[0, 1]``."""
    size = (THUMBNAIL, THUMBNAIL)
    thumbnail = cv2.resize(image, size, interpolation=cv2.INTER_AREA).ravel() / 255.0
    colours = [_share(np.histogram(image[..., c], CHANNEL_BINS, (0, 256))[0]) for c in range(3)]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    energy, direction = _gradients(grey, GRID_SIZE)
    cell = np.arange(GRID_SIZE) // (GRID_SIZE // CELLS)
    index = (cell[:, None] * CELLS + cell[None, :]) * DIRECTIONS + direction
    grid = np.bincount(index.ravel(), energy.ravel(), CELLS * CELLS * DIRECTIONS)
    return np.concatenate([thumbnail, *colours, _share(grid)]).astype(np.float32)


def engineered_features(image: np.ndarray) -> np.ndarray:
    """``engineered`` features of a uint8 RGB image: float32 ``(728,)`` in ``[0, 1]``."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    joint = cv2.calcHist([hsv], [0, 1, 2], None, [8, 4, 4], [0, 180, 0, 256, 0, 256]).ravel()
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    textures = []
    for size in SCALES:
        energy, direction = _gradients(grey, size)
        strength = np.log1p(energy) / np.log1p(MAX_ENERGY) * STRENGTHS
        index = np.minimum(strength.astype(int), STRENGTHS - 1) * DIRECTIONS + direction
        textures.append(_share(np.bincount(index.ravel(), minlength=STRENGTHS * DIRECTIONS)))
    features = np.concatenate([plain_features(image), _share(joint), *textures])
    return features.astype(np.float32)


def floor_accuracy(
    train_paths: Sequence[str | Path],
    train_labels: Sequence[int],
    test_paths: Sequence[str | Path],
    test_labels: Sequence[int],
) -> dict[str, float]:
    """Test accuracies, fractions in ``[0, 1]``, of both sets of features by name."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def matrix(paths: Sequence[str | Path], label: str) -> np.ndarray:
        rows = (engineered_features(decode(Path(path))) for path in paths)
        return np.stack(list(progress(rows, total=len(paths), label=label)))

    train = matrix(train_paths, "floor, training images")
    test = matrix(test_paths, "floor, test images")
    plain = plain_features(np.zeros((8, 8, 3), np.uint8)).size
    found = {}
    for name, columns in {"plain": slice(0, plain), "engineered": slice(0, None)}.items():
        scaler = StandardScaler().fit(train[:, columns])
        classifier = LogisticRegression(C=0.01, max_iter=200, tol=1e-3)
        classifier.fit(scaler.transform(train[:, columns]), np.asarray(train_labels))
        found[name] = float(
            classifier.score(scaler.transform(test[:, columns]), np.asarray(test_labels))
        )
    return found
