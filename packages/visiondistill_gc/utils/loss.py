"""The distillation loss: labels and a teacher's soft answers, weighted, also of mixed images."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor, nn

from shared_core.for_paddle.losses import kd_kl

TEMPERATURE, ALPHA = 4.0, 0.5  # the original's


def _log_softmax(logits: Tensor) -> Tensor:
    """Exact for any logits: Paddle's own, on a CPU, never goes below -64."""
    return logits - paddle.logsumexp(logits, axis=1, keepdim=True)


def target_cross_entropy(
    logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None
) -> Tensor:
    """``sum_ic w_c t_ic (-log p_ic) / sum_ic w_c t_ic``; nats.

    With one-hot targets it is the (weighted) cross-entropy; with targets that mix two labels it is
    ``lam * CE(a) + (1 - lam) * CE(b)`` when all weights are equal.

    Args:
        logits: float, shape ``(N, C)``.
        targets: float, shape ``(N, C)``, rows sum to 1; detached.
        class_weights: float, shape ``(C,)``; None for equal ones.

    Raises:
        ValueError: shapes do not fit.
    """
    if logits.ndim != 2 or list(logits.shape) != list(targets.shape):
        raise ValueError(
            f"logits and targets have shapes {tuple(logits.shape)} and {tuple(targets.shape)}, "
            "expected two equal shapes (N, C)"
        )
    weighted = targets.detach()
    if class_weights is not None:
        if list(class_weights.shape) != list(logits.shape[1:]):
            raise ValueError(
                f"class_weights have shape {tuple(class_weights.shape)}, "
                f"expected ({logits.shape[1]},)"
            )
        weighted = weighted * class_weights
    return -(weighted * _log_softmax(logits)).sum() / weighted.sum()


class DistillationLoss(nn.Layer):
    """``alpha * CE + (1 - alpha) * T^2 * KL(teacher || student)``.

    Args:
        temperature: ``T``, above 0.
        alpha: weight of the labels, fraction in [0, 1]; 1 asks no teacher.
        class_weights: shape ``(C,)``, for the cross-entropy; None for equal ones.

    Raises:
        ValueError: a value out of range.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        *,
        temperature: float = TEMPERATURE,
        alpha: float = ALPHA,
        class_weights: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, expected a fraction in [0, 1]")
        self.temperature, self.alpha = temperature, alpha
        self.class_weights = (
            None if class_weights is None else paddle.to_tensor(class_weights, dtype="float32")
        )

    def forward(
        self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scalars ``loss``, ``ce`` and, with a teacher, ``kd`` (with its factor ``T^2``).

        Args:
            logits: of the student, ``(N, C)``.
            targets: ``(N, C)``, rows sum to 1.
            teacher_logits: ``(N, C)``; needed unless ``alpha`` is 1.

        Raises:
            ValueError: no teacher although ``alpha`` is below 1, or shapes that do not fit.
        """
        ce = target_cross_entropy(logits, targets, class_weights=self.class_weights)
        if self.alpha == 1:
            return {"loss": ce, "ce": ce}
        if teacher_logits is None:
            raise ValueError(f"alpha is {self.alpha} without a teacher's logits, expected alpha 1")
        kd = kd_kl(logits, teacher_logits, temperature=self.temperature)
        return {"loss": self.alpha * ce + (1 - self.alpha) * kd, "ce": ce, "kd": kd}


def balanced_weights(labels: np.ndarray, *, num_classes: int) -> np.ndarray:
    """``N / (C * n_c)`` of each class, float64 ``(C,)``: a rare class counts more.

    Raises:
        ValueError: a class without samples.
    """
    counts = np.bincount(np.asarray(labels), minlength=num_classes)
    if len(counts) != num_classes or counts.min() == 0:
        raise ValueError(f"class counts are {counts.tolist()}, expected {num_classes}, all above 0")
    return len(labels) / (num_classes * counts.astype(np.float64))
