"""Losses on logits, each with its scale, its reduction and its direction stated.

``shared_core.for_paddle.losses`` has the same functions; the same arrays give the same numbers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows


def _check_pair(first: Tensor, second: Tensor, what: str) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"{what} have shapes {tuple(first.shape)} and {tuple(second.shape)}, "
            "expected two equal shapes (N, C)"
        )


def _check_smoothing(smoothing: float) -> None:
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}, expected 0 <= smoothing < 1")


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Hinton's soft-target loss, ``T^2 * KL(teacher || student)`` at temperature ``T``.

    ``T^2`` keeps the size of the gradient when ``T`` changes. At ``T = 1`` it is the plain KL.

    Args:
        student_logits: float, shape ``(N, C)``; gradients flow here only.
        teacher_logits: float, shape ``(N, C)``; detached.
        temperature: ``T > 0``, divides both.

    Returns:
        Scalar in nats: summed over the classes, averaged over the batch.

    Raises:
        ValueError: shapes differ, or ``T`` is not positive.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    _check_pair(student_logits, teacher_logits, "student and teacher logits")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    log_p = F.log_softmax(student_logits / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1).mean() * temperature**2


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against soft targets, ``-sum_c target_c * log p_c``.

    Args:
        logits: float, shape ``(N, C)``.
        targets: float, shape ``(N, C)``, fractions that sum to 1 in each row; detached.

    Returns:
        Scalar in nats: summed over the classes, averaged over the batch.

    Raises:
        ValueError: shapes differ.
    """
    _check_pair(logits, targets, "logits and targets")
    return -(targets.detach() * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits, over batch and classes.

    Args:
        student_logits: float, shape ``(N, C)``; gradients flow here only.
        teacher_logits: float, shape ``(N, C)``; detached.

    Returns:
        Scalar, in squared logits.

    Raises:
        ValueError: shapes differ.

    Source: Ba and Caruana 2014, arXiv:1312.6184, section 2.2 (without its factor 1/2).
    """
    _check_pair(student_logits, teacher_logits, "student and teacher logits")
    return (student_logits - teacher_logits.detach()).square().mean()


def js_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence, ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``.

    Args:
        student_logits: float, shape ``(N, C)``, gives ``p``; gradients flow here only.
        teacher_logits: float, shape ``(N, C)``, gives ``q``; detached.

    Returns:
        Scalar in nats, in ``[0, ln 2]``: summed over the classes, averaged over the batch.

    Raises:
        ValueError: shapes differ.

    Source: Lin 1991, doi:10.1109/18.61115, equation 4.1 with equal weights.
    """
    _check_pair(student_logits, teacher_logits, "student and teacher logits")
    log_p = F.log_softmax(student_logits, dim=1)
    log_q = F.log_softmax(teacher_logits.detach(), dim=1)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453  # ln 2
    to_m = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * to_m.sum(dim=1).mean()


def label_smoothing_cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy against ``(1 - s) * one_hot + s / C``.

    Args:
        logits: float, shape ``(N, C)``.
        labels: int64, shape ``(N,)``, values in ``[0, C)``.
        smoothing: ``0 <= s < 1``; 0 is the plain cross-entropy.

    Returns:
        Scalar in nats, averaged over the batch.

    Raises:
        ValueError: shapes do not fit, or ``s`` is out of range.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    _check_smoothing(smoothing)
    log_p = _log_probabilities(logits, labels)
    hard = -log_p.gather(1, labels[:, None])[:, 0]
    uniform = -log_p.mean(dim=1)
    return ((1 - smoothing) * hard + smoothing * uniform).mean()


def cross_entropy(logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy against class numbers.

    Args:
        logits: float, shape ``(N, C)``.
        labels: int64, shape ``(N,)``, values in ``[0, C)``.
        class_weights: float, shape ``(C,)``, or None for equal ones. The result is the weighted
            mean, ``sum_n w[y_n] * loss_n / sum_n w[y_n]``.

    Returns:
        Scalar in nats.

    Raises:
        ValueError: shapes do not fit.
    """
    log_p = _log_probabilities(logits, labels)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    if class_weights is None:
        return losses.mean()
    if class_weights.shape != logits.shape[1:]:
        raise ValueError(
            f"class_weights have shape {tuple(class_weights.shape)}, expected ({logits.shape[1]},)"
        )
    weights = class_weights[labels]
    return (weights * losses).sum() / weights.sum()


def _log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels have shapes {tuple(logits.shape)} and {tuple(labels.shape)}, "
            "expected (N, C) and (N,)"
        )
    return F.log_softmax(logits, dim=1)
