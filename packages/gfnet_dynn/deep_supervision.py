"""Heads in the middle of a network while it learns, so that its early blocks learn to classify.

A network that is trained by its last head alone keeps what tells classes apart for its last
blocks; exits that are put on it afterwards are weak. Here every exit has a loss of its own from the
first step. These heads belong to the training, not to the network: the exits' own warm-up trains
new ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dynn.distillation import block_outputs
from gfnet_dynn.finetune import Losses
from shared_core.for_torch.losses import kd_kl, soft_cross_entropy


class DeepSupervision(nn.Module):
    """``weight / G * sum_l (CE_l + kd * T^2 KL(final head || exit l))``, added to a loss.

    The exits see what they will see later: ``mean(norm(tokens))`` after their block. The final
    head's answer is detached: it teaches the exits and is not pulled towards them.

    Args:
        dim, num_classes: of the network.
        exits: 0-based blocks, G of them.
        weight: of the whole term, more than 0.
        kd: weight of the KL part; 0 leaves deep supervision by the labels alone.
        temperature: of the KL part.
        smoothing: of the labels, fraction in [0, 1).

    Source: labels at every exit: Lee et al. 2015, arXiv 1409.5185, and MSDNet, Huang et al. 2018,
    arXiv 1703.09844, section 4; the final head as their teacher: Zhang et al. 2019, "Be your own
    teacher", arXiv 1905.08094, section 3.2 (its hints on features are left out: here all exits
    share width, grid and norm).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        exits: Sequence[int],
        *,
        weight: float = 1.0,
        kd: float = 1.0,
        temperature: float = 3.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        if not exits:
            raise ValueError("no exits to supervise; expected one or more")
        if not weight > 0 or not kd >= 0:
            raise ValueError(
                f"weights of the deep supervision are {weight} and {kd}; expected more than 0, and "
                "0 or more"
            )
        self.exits = tuple(int(block) for block in exits)
        self.weight, self.kd, self.temperature = weight, kd, temperature
        self.smoothing = smoothing
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in self.exits)

    def forward(self, features: Sequence[Tensor], final: Tensor, targets: Tensor) -> Tensor:
        """The weighted term, a scalar in nats.

        Args:
            features: G of ``(N, C)``, the pooled tokens of the exits.
            final: ``(N, K)``, logits of the final head.
            targets: int64 ``(N,)``, or class shares ``(N, K)``.
        """
        total = final.new_zeros((), dtype=torch.float32)
        for head, feature in zip(self.heads, features, strict=True):
            logits = head(feature).float()
            total = total + label_loss(logits, targets, smoothing=self.smoothing)
            if self.kd:
                total = total + self.kd * kd_kl(
                    logits, final.detach().float(), temperature=self.temperature
                )
        return self.weight * total / len(self.exits)

    def added_to(self, losses: Losses, model: nn.Module) -> Losses:
        """``losses`` of ``model`` with this term: its ``loss`` grows by it, named ``deep``.

        ``losses`` runs ``model`` once; what the exits need is taken from that pass.
        """

        def both(images: Tensor, targets: Tensor, epoch: float) -> dict[str, Tensor]:
            with block_outputs(model, (*self.exits, model.depth - 1)) as tokens:
                parts = losses(images, targets, epoch)
            *early, last = (model.pool(t) for t in tokens)
            term = self(early, model.head(last), targets)
            return {**parts, "loss": parts["loss"] + term, "deep": term}

        return both


def label_loss(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, of class numbers ``(N,)`` or class shares ``(N, K)``."""
    if targets.ndim == 2:
        soft = targets * (1 - smoothing) + smoothing / targets.shape[1]
        return soft_cross_entropy(logits, soft)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)
