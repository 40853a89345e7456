"""The losses of :mod:`shared_core.for_torch.losses` in Paddle: the same names, the same numbers.

Scales, directions, sources: see there. Gradients flow into the first argument only.
"""

import paddle
from paddle import Tensor


def _check_pair(first: Tensor, second: Tensor, what: str) -> None:
    if first.ndim != 2 or list(first.shape) != list(second.shape):
        raise ValueError(
            f"{what} have shapes {tuple(first.shape)} and {tuple(second.shape)}, "
            "expected two equal shapes (N, C)"
        )


def _log_softmax(logits: Tensor) -> Tensor:
    """Exact for any logits: Paddle's own, on a CPU, never goes below -64."""
    return logits - paddle.logsumexp(logits, axis=1, keepdim=True)


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` at temperature ``T``; nats, batch mean.

    Args:
        student_logits: float, shape ``(N, C)``.
        teacher_logits: float, shape ``(N, C)``; detached.
        temperature: ``T > 0``, divides both.

    Raises:
        ValueError: shapes differ, or ``T`` is not positive.
    """
    _check_pair(student_logits, teacher_logits, "student and teacher logits")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    log_p = _log_softmax(student_logits / temperature)
    log_q = _log_softmax(teacher_logits.detach() / temperature)
    return (log_q.exp() * (log_q - log_p)).sum(axis=1).mean() * temperature**2


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-sum_c target_c * log p_c``; nats, batch mean.

    Args:
        logits: float, shape ``(N, C)``.
        targets: float, shape ``(N, C)``, fractions that sum to 1 in each row; detached.

    Raises:
        ValueError: shapes differ.
    """
    _check_pair(logits, targets, "logits and targets")
    return -(targets.detach() * _log_softmax(logits)).sum(axis=1).mean()


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits, over batch and classes.

    Args:
        student_logits: float, shape ``(N, C)``.
        teacher_logits: float, shape ``(N, C)``; detached.

    Raises:
        ValueError: shapes differ.
    """
    _check_pair(student_logits, teacher_logits, "student and teacher logits")
    return (student_logits - teacher_logits.detach()).square().mean()


def js_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence; nats in ``[0, ln 2]``, batch mean.

    Args:
        student_logits: float, shape ``(N, C)``.
        teacher_logits: float, shape ``(N, C)``; detached.

    Raises:
        ValueError: shapes differ.
    """
    _check_pair(student_logits, teacher_logits, "student and teacher logits")
    log_p = _log_softmax(student_logits)
    log_q = _log_softmax(teacher_logits.detach())
    log_m = paddle.logaddexp(log_p, log_q) - 0.6931471805599453  # ln 2
    to_m = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * to_m.sum(axis=1).mean()


def label_smoothing_cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy against ``(1 - s) * one_hot + s / C``; nats, batch mean.

    Args:
        logits: float, shape ``(N, C)``.
        labels: int64, shape ``(N,)``, values in ``[0, C)``.
        smoothing: ``0 <= s < 1``.

    Raises:
        ValueError: shapes do not fit, or ``s`` is out of range.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}, expected 0 <= smoothing < 1")
    log_p = _log_probabilities(logits, labels)
    hard = -_at_label(log_p, labels)
    uniform = -log_p.mean(axis=1)
    return ((1 - smoothing) * hard + smoothing * uniform).mean()


def cross_entropy(logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy against class numbers; nats, (weighted) batch mean.

    Args:
        logits: float, shape ``(N, C)``.
        labels: int64, shape ``(N,)``, values in ``[0, C)``.
        class_weights: float, shape ``(C,)``, or None for equal ones.

    Raises:
        ValueError: shapes do not fit.
    """
    losses = -_at_label(_log_probabilities(logits, labels), labels)
    if class_weights is None:
        return losses.mean()
    if list(class_weights.shape) != list(logits.shape[1:]):
        raise ValueError(
            f"class_weights have shape {tuple(class_weights.shape)}, expected ({logits.shape[1]},)"
        )
    weights = paddle.gather(class_weights, labels)
    return (weights * losses).sum() / weights.sum()


def _log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or list(labels.shape) != list(logits.shape[:1]):
        raise ValueError(
            f"logits and labels have shapes {tuple(logits.shape)} and {tuple(labels.shape)}, "
            "expected (N, C) and (N,)"
        )
    return _log_softmax(logits)


def _at_label(log_p: Tensor, labels: Tensor) -> Tensor:
    return paddle.take_along_axis(log_p, labels.unsqueeze(1), axis=1).squeeze(1)
