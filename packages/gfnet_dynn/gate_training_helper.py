"""What a gate should have said: level losses, target exits, cumulative targets, their loss.

Source: JEI-DNN, Regol et al. 2023, arXiv 2310.09163: the gates are the inner problem of a bi-level
one, their targets come from the loss and the cost of every exit.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTIVES = ("ce", "zeroOne", "prob")
MAX_POS_WEIGHT = 5.0  # the original's cap
MIN_COUNT = 0.1  # keeps a gate without positives finite


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
