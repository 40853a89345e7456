"""How probable each exit is, and the losses of the heads weighted by it.

Source: JEI-DNN, Regol et al. 2023, arXiv 2310.09163. The original multiplied the losses by a
ratio through which gradients flowed, which turns the weighted mean back into the plain mean, in
value and in gradient; here the ratio is detached, and ``legacy`` names the original's result.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gfnet_dynn.models.custom_modules.exit_policy import exit_probabilities, first_reached

__all__ = [
    "MODES",
    "classifier_loss",
    "conditional_probabilities",
    "exit_losses",
    "exit_probabilities",
    "sequential_probabilities",
]

MODES = ("single", "weighted", "boosted", "legacy")
MAX_RATIO = 100.0  # bound of the boost where nearly all of the mass lies on solved samples
LEAVE_AT = 0.5  # a sample leaves where its conditional exit probability reaches this


def conditional_probabilities(probabilities: Tensor) -> Tensor:
    """Probability to leave at exit l of a sample that came that far.

    ``c_l = p_l / (1 - sum_{j<l} p_j)``, so that ``prod_{j<l} (1 - c_j) = 1 - sum_{j<l} p_j``.
    Where no mass is left nobody comes that far, and ``c_l`` is 1 (the original had 0/0 there).

    Args:
        probabilities: ``(N, G+1)`` of ``exit_probabilities``.

    Returns:
        ``(N, G)`` in [0, 1].
    """
    early = probabilities[:, :-1]
    left = 1 - F.pad(early.cumsum(dim=1)[:, :-1], (1, 0))  # (N, G)
    empty = left <= torch.finfo(left.dtype).eps * early.shape[1]
    c = early / left.masked_fill(empty, 1.0)
    return c.clamp(0, 1).masked_fill(empty, 1.0)


def sequential_probabilities(gates: Tensor) -> Tensor:
    """Mode ``single``'s own rule: ``c_l = clip(g_l / prod_{j<l}(1 - c_j), 0, 1)``.

    Args:
        gates: ``(N, G)`` in [0, 1].

    Returns:
        ``(N, G)`` in [0, 1]; 1 where the product is 0.
    """
    left = torch.ones_like(gates[:, 0])
    columns = []
    for g in gates.unbind(dim=1):
        empty = left <= 0
        c = (g / left.masked_fill(empty, 1.0)).clamp(0, 1).masked_fill(empty, 1.0)
        left = left * (1 - c)
        columns.append(c)
    return torch.stack(columns, dim=1)


def exit_losses(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of each sample at each exit, nats, ``(N, len(logits))``, with gradient."""
    return torch.stack(
        [F.cross_entropy(z.float(), labels, reduction="none") for z in logits], dim=1
    )


def classifier_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    gate_logits: Tensor,
    *,
    mode: str = "boosted",
    include_final: bool = False,
) -> Tensor:
    """The loss of the heads, with the samples each exit will get weighing more there.

    With P the exit probabilities (no gradient) and L the cross-entropies, both ``(N, E)``:

    - ``weighted``: ``sum(P L) / sum(P)``, the P-weighted mean.
    - ``boosted``: ``mean(P L r)`` with ``r = sum(L) / sum(P L)`` **detached** and at most 100: the
      value is that of ``mean(L)``, the gradient that of ``weighted`` but for its length.
    - ``legacy``: ``mean(L)``. The original's ``boosted`` and ``weighted`` were this, because
      gradients also flowed through r; its 0/0 where all losses underflow is gone.
    - ``single``: mean cross-entropy of each sample at the one exit it leaves at.

    Args:
        logits: G+1 tensors ``(N, K)``, final head last.
        labels: int64 ``(N,)``.
        gate_logits: ``(N, G)``; no gradient reaches it.
        mode: one of ``single``, ``weighted``, ``boosted``, ``legacy``.
        include_final: whether the final head is among the E exits of the mean. It is not while
            the backbone is frozen (E = G), and is where the backbone learns (E = G+1).

    Returns:
        A scalar in nats. In mode ``single`` it may carry no gradient: when the head that all
        samples leave at does not learn.
    """
    if mode not in MODES:
        raise ValueError(f"unknown classifier loss {mode!r}; expected one of {', '.join(MODES)}")
    if gate_logits.shape[1] != len(logits) - 1:
        raise ValueError(
            f"{gate_logits.shape[1]} gates for {len(logits)} exits; expected one less than exits"
        )
    gates = gate_logits.detach().float().sigmoid()
    if mode == "single":
        chosen = first_reached(sequential_probabilities(gates), [LEAVE_AT])
        return exit_losses(logits, labels).gather(1, chosen[:, None]).mean()
    count = len(logits) if include_final else len(logits) - 1
    losses = exit_losses(logits[:count], labels)  # (N, E)
    if mode == "legacy":
        return losses.mean()
    mass = exit_probabilities(gates)[:, :count]
    weighted = mass * losses
    tiny = torch.finfo(losses.dtype).tiny
    if mode == "weighted":
        return weighted.sum() / mass.sum().clamp_min(tiny)
    ratio = losses.detach().sum() / weighted.detach().sum().clamp_min(tiny)
    return (weighted * ratio.clamp_max(MAX_RATIO)).mean()
