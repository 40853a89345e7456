"""Start a head with the probabilities that are expected: the "sample-free" bias (--bias_prior).

A fresh sigmoid head says 0.5 for each of K classes, of which K - 1 are wrong: the loss starts high
and its first gradients only push everything down. With ``b_c = log(pi_c / (1 - pi_c))`` the head
starts at ``pi_c``. The loss over all classes is least when ``pi_c`` is the class' share of the
data; a larger prior favours a class from the start. For softmax it is ``b_c = log pi_c``.

Source: Chen et al. 2019, arXiv:1909.04868, section on optimal bias initialization; Lin et al. 2017,
arXiv:1708.02002, section 4.1 (one prior for all classes).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from shared_core.for_torch.networks import head_names


def share_of_classes(labels: Sequence[int], num_classes: int) -> list[float]:
    """The share of each class in ``labels``, with one more sample of each so that none is 0.

    Returns:
        K numbers in (0, 1) that sum to 1.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes) + 1.0
    return [float(share) for share in counts / counts.sum()]


def set_bias_prior(
    model: nn.Module, priors: float | Sequence[float], *, num_classes: int, family: str = "sigmoid"
) -> list[float]:
    """Set the bias of the head's layers to ``priors``; their weights stay.

    Args:
        model: its head has ``num_classes`` outputs.
        priors: one probability for all classes, or K of them, each in (0, 1).
        num_classes: K.
        family: ``sigmoid`` (or ``bce``): ``log(pi / (1 - pi))``; ``softmax``: ``log pi``.

    Returns:
        The K biases that were set.

    Raises:
        ValueError: another number of priors, one out of range, one prior with softmax (it says
            nothing there), or a head without bias.
    """
    values = [float(priors)] * num_classes if isinstance(priors, int | float) else list(priors)
    if len(values) != num_classes:
        raise ValueError(f"--bias_prior has {len(values)} values, expected 1 or {num_classes}")
    if bad := [value for value in values if not 0.0 < value < 1.0]:
        raise ValueError(f"--bias_prior {bad[0]:g}, expected 0 < prior < 1")
    pi = np.array(values, dtype=np.float64)
    if family == "softmax":
        if np.ptp(pi) == 0.0:
            raise ValueError(
                "--bias_prior: equal priors change nothing with softmax, expected one a class"
            )
        biases = np.log(pi)
    else:
        biases = np.log(pi) - np.log1p(-pi)
    modules = dict(model.named_modules())
    heads = [modules[name] for name in head_names(model, num_classes)]
    for head in heads:
        if head.bias is None:
            raise ValueError("--bias_prior: the head has no bias")
    with torch.no_grad():
        for head in heads:
            head.bias.copy_(torch.from_numpy(biases).to(head.bias))
    return [float(bias) for bias in biases]
