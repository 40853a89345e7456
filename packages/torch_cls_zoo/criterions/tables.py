"""Weights by class matrix: what a confusion costs, and between which probabilities terms count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def _buffer(values: object) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


class ClassWeight(nn.Module):
    """``G = t @ M``: row of the true class, column of the class that a term is about.

    Soft targets get the expected row. With softmax only the target's own column matters, for the
    other terms are 0; with one-hot targets that is the diagonal.
    """

    def __init__(self, matrix: object) -> None:
        super().__init__()
        self.matrix: Tensor
        self.register_buffer("matrix", _buffer(matrix), persistent=False)

    def forward(self, probs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Weights ``(N, K)`` for targets float ``(N, K)``."""
        return targets @ self.matrix


class ThresholdWeight(nn.Module):
    """``G = 1`` where ``low < p < up``, else 0; the limits are rows of the true class.

    With the published limits a term of a wrong class counts only while ``p > 0.05``, that of the
    true class only while ``p < 0.95``.
    """

    def __init__(self, low: object, up: object) -> None:
        super().__init__()
        self.low: Tensor
        self.up: Tensor
        self.register_buffer("low", _buffer(low), persistent=False)
        self.register_buffer("up", _buffer(up), persistent=False)

    def forward(self, probs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Weights ``(N, K)`` for probabilities and targets ``(N, K)``."""
        inside = (targets @ self.low < probs) & (probs < targets @ self.up)
        return inside.to(probs.dtype)
