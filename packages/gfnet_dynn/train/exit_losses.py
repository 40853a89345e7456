"""The losses of gates and heads: what a gate should have said, and which samples weigh in a head.

Source: JEI-DNN, Regol et al. 2023, arXiv 2310.09163: the gates are the inner problem of a bi-level
one, their targets come from the loss and the cost of every exit; the heads' losses are weighted by
how probable each exit is. The original multiplied these by a ratio through which gradients flowed,
which turns the weighted mean back into the plain mean, in value and in gradient; here the ratio is
detached, and ``legacy`` names the original's result.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gfnet_dynn.choices import HEAD_LOSSES, OBJECTIVES
from gfnet_dynn.models.exit_policy import exit_probabilities, first_reached

MAX_POS_WEIGHT = 5.0  # the original's cap
MIN_COUNT = 0.1  # keeps a gate without positives finite
MAX_RATIO = 100.0  # bound of the boost where nearly all of the mass lies on solved samples
LEAVE_AT = 0.5  # a sample leaves where its conditional exit probability reaches this


def normalised_costs(exit_costs: Sequence[float] | np.ndarray) -> np.ndarray:
    """Costs as fractions of the full network's cost: ``c_l / c_final``, float64 ``(G+1,)``.

    Args:
        exit_costs: cumulative MACs up to each exit, final head last.
    """
    costs = np.asarray(exit_costs, dtype=np.float64)
    if costs.ndim != 1 or costs.size < 2 or not np.isfinite(costs).all():
        raise ValueError(f"exit_costs has shape {costs.shape}; expected (G+1,), finite, G >= 1")
    if costs[0] <= 0 or (np.diff(costs) <= 0).any():
        raise ValueError(f"exit_costs is {costs.tolist()}; expected positive and increasing")
    return costs / costs[-1]


def level_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    costs: Sequence[float] | np.ndarray,
    tradeoff: float,
    objective: str = "ce",
) -> Tensor:
    """What leaving at each exit costs a sample: ``loss_l + tradeoff * cost_l``.

    Args:
        logits: G+1 tensors ``(N, K)``, final head last.
        labels: int64 ``(N,)``.
        costs: ``(G+1,)``, as fractions of the full network's cost.
        tradeoff: lambda >= 0 (``--ce_ic_tradeoff``); more of it means earlier exits.
        objective: the loss part. ``ce``: cross-entropy in nats. ``zeroOne``: -1 where the exit
            is right, else 0. ``prob``: minus the top probability where it is right, else 0.

    Returns:
        float32 ``(N, G+1)`` without gradient.
    """
    if objective not in OBJECTIVES:
        raise ValueError(
            f"unknown gate objective {objective!r}; expected one of {', '.join(OBJECTIVES)}"
        )
    if not tradeoff >= 0:
        raise ValueError(f"the cost trade-off is {tradeoff}; expected 0 or more")
    if len(costs) != len(logits):
        raise ValueError(f"{len(costs)} costs for {len(logits)} exits; expected one for each")
    columns = []
    with torch.no_grad():
        for exit_logits in logits:
            exit_logits = exit_logits.float()
            if objective == "ce":
                columns.append(F.cross_entropy(exit_logits, labels, reduction="none"))
                continue
            right = (exit_logits.argmax(dim=1) == labels).float()
            if objective == "zeroOne":
                columns.append(-right)
            else:
                columns.append(-right * exit_logits.softmax(dim=1).amax(dim=1))
        losses = torch.stack(columns, dim=1)  # (N, G+1)
        cost = torch.as_tensor(np.asarray(costs), dtype=losses.dtype, device=losses.device)
        return losses + tradeoff * cost


def target_exits(losses: Tensor) -> Tensor:
    """The exit of least level loss, int64 ``(N,)`` in ``0..G``; the earliest of equals."""
    # argmin names no winner among equals on every device, so ask for the first minimum.
    is_least = losses == losses.amin(dim=1, keepdim=True)
    return is_least.to(torch.uint8).argmax(dim=1)


def gate_targets(targets: Tensor, num_gates: int) -> Tensor:
    """ "Exit subsequent" targets: gate l should open when the target exit is l or earlier.

    Args:
        targets: int64 ``(N,)`` in ``0..num_gates``; ``num_gates`` is the final head.

    Returns:
        float32 ``(N, num_gates)`` of zeros and ones; a row of zeros for the final head.
    """
    gates = torch.arange(num_gates, device=targets.device)
    return (targets[:, None] <= gates[None, :]).float()


def pos_weights(
    positive_counts: Sequence[float] | Tensor | np.ndarray,
    num_samples: int,
    *,
    maximum: float = MAX_POS_WEIGHT,
) -> Tensor:
    """Weight of the positives of each gate: negatives over positives, within a band.

    The counts are those of the cumulative targets (samples whose target exit is l *or earlier*).
    The original counted the samples whose target is exactly l, which fits other targets than the
    ones it trained. It also had no lower bound: where all samples are positive the weight becomes
    0 and the gate never learns to open; here it stays at ``1 / maximum``.

    Args:
        positive_counts: ``(G,)``, how many of ``num_samples`` samples are positive for each gate.
        maximum: the weights lie in ``[1 / maximum, maximum]``.

    Returns:
        float32 ``(G,)``.
    """
    if num_samples < 1:
        raise ValueError(f"positive counts of {num_samples} samples; expected 1 or more")
    counts = torch.as_tensor(np.asarray(positive_counts, dtype=np.float64))
    if (counts < 0).any() or (counts > num_samples).any():
        raise ValueError(
            f"positive counts are {counts.tolist()}; expected 0 to {num_samples} for each gate"
        )
    counts = counts.clamp_min(MIN_COUNT)
    return ((num_samples - counts) / counts).clamp(1 / maximum, maximum).float()


def gate_loss(gate_logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the gates, mean over samples and gates, in nats.

    Args:
        gate_logits: ``(N, G)``.
        targets: ``(N, G)`` from :func:`gate_targets`.
        weights: ``(G,)`` from :func:`pos_weights`, for the positives; 1 everywhere if None.
    """
    if weights is not None:
        weights = weights.to(gate_logits.device, torch.float32)
    return F.binary_cross_entropy_with_logits(gate_logits.float(), targets, pos_weight=weights)


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
    if mode not in HEAD_LOSSES:
        raise ValueError(
            f"unknown classifier loss {mode!r}; expected one of {', '.join(HEAD_LOSSES)}"
        )
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
