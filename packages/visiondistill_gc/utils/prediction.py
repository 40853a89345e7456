"""From images to probabilities: the one path that evaluation, inference and the service share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from shared_core.datasets import Batch
from shared_core.for_paddle.data import Normalizer

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outputs:
    """Logits of a set of images, in the order in which the loader gave them."""

    logits: NDArray[np.float32]  # (N, C)
    labels: NDArray[np.int64]  # (N,)
    indices: NDArray[np.int64]  # (N,), into the image set


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities ``(N, C)`` of logits ``(N, C)``, in float64; each row sums to 1."""
    values = np.asarray(logits, dtype=np.float64)
    exps = np.exp(values - values.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


@paddle.no_grad()
def predict_logits(
    forward: Forward, batches: Iterable[Batch], *, normalizer: Normalizer
) -> Outputs:
    """Run a network over batches of uint8 views; set it to eval mode before.

    Args:
        forward: takes float32 ``(N, 3, H, W)``, gives logits ``(N, C)``.
        batches: of a ``shared_core.datasets.BatchLoader``.
        normalizer: with the model's mean and std.

    Raises:
        ValueError: not one batch.
    """
    logits, labels, indices = [], [], []
    for batch in batches:
        logits.append(forward(normalizer(batch.images)).astype("float32").numpy())
        labels.append(batch.labels)
        indices.append(batch.indices)
    if not logits:
        raise ValueError("no images to predict, expected at least one")
    return Outputs(np.concatenate(logits), np.concatenate(labels), np.concatenate(indices))
