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

from gfnet_dynn.settings import DeepLosses
from gfnet_dynn.train.distillation import block_outputs
from gfnet_dynn.train.finetune import Task
from shared_core.for_torch.losses import kd_kl


class DeepTask(Task):
    """Another task with ``weight / G * sum_l (CE_l + kd * T^2 KL(final head || exit l))`` added.

    The exits see what they will see later: ``mean(norm(tokens))`` after their block. The final
    head's answer is detached: it teaches the exits and is not pulled towards them.

    Args:
        inner: the task; it runs its model once, and what the exits need is taken from that pass.
        exits: 0-based blocks, G of them.
        settings: ``deep_supervision`` is the weight of the whole term, more than 0; ``deep_kd`` 0
            leaves deep supervision by the labels alone.
        smoothing: of the labels, fraction in [0, 1).

    Source: labels at every exit: Lee et al. 2015, arXiv 1409.5185, and MSDNet, Huang et al. 2018,
    arXiv 1703.09844, section 4; the final head as their teacher: Zhang et al. 2019, "Be your own
    teacher", arXiv 1905.08094, section 3.2 (its hints on features are left out: here all exits
    share width, grid and norm).
    """

    def __init__(
        self, inner: Task, exits: Sequence[int], settings: DeepLosses, *, smoothing: float = 0.0
    ):
        super().__init__()
        if not exits or not settings.deep_supervision > 0:
            raise ValueError(
                f"deep supervision of exits {list(exits)} with weight {settings.deep_supervision}; "
                "expected one exit or more, and more than 0"
            )
        self.inner, self.settings, self.smoothing = inner, settings, smoothing
        self.exits = tuple(int(block) for block in exits)
        widths, classes = inner.model.widths, inner.model.num_classes
        self.heads = nn.ModuleList(nn.Linear(widths[block], classes) for block in self.exits)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The inner task's."""
        return self.inner.model

    def forward(
        self, images: Tensor, targets: Tensor, epoch: float, answers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The inner losses, with the term in ``loss`` and by itself under ``deep``."""
        with block_outputs(self.model, (*self.exits, self.model.depth - 1)) as tokens:
            parts = self.inner(images, targets, epoch, answers)
        *early, last = (self.model.pool(t) for t in tokens)
        term = self.term(early, self.model.head(last), targets)
        return {**parts, "loss": parts["loss"] + term, "deep": term}

    def term(self, features: Sequence[Tensor], final: Tensor, targets: Tensor) -> Tensor:
        """The weighted term, a scalar in nats.

        Args:
            features: G of ``(N, C)``, the pooled tokens of the exits.
            final: ``(N, K)``, logits of the final head.
            targets: int64 ``(N,)``, or class shares ``(N, K)``.
        """
        settings, taught = self.settings, final.detach().float()
        total = final.new_zeros((), dtype=torch.float32)
        for head, feature in zip(self.heads, features, strict=True):
            logits = head(feature).float()
            total = total + F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
            if settings.deep_kd:
                temperature = settings.deep_temperature
                total = total + settings.deep_kd * kd_kl(logits, taught, temperature=temperature)
        return settings.deep_supervision * total / len(self.exits)
