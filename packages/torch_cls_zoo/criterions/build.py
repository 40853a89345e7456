"""The criterion: cross-entropy of the softmax or the sigmoid family, times weights for each term.

For logits ``z``, targets ``t`` (one-hot or soft), probabilities ``p`` and ``G``, the product of the
weights that were asked for (1 without any; ``p`` is detached in it)::

    softmax   loss of sample i = u_i * sum_c  G_ic * t_ic * -log p_ic            p = softmax(z)
    sigmoid   loss of sample i = u_i * sum_c  G_ic * BCE(z_ic, t_ic)             p = sigmoid(z)

The criterion is the mean over the batch, so that losses of different batch sizes compare. The first
version of this zoo summed; multiply by the batch size to have its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from torch_cls_zoo.criterions.ghm import GHMWeight
from torch_cls_zoo.criterions.matrices import Matrices
from torch_cls_zoo.criterions.ohm import OHMWeight
from torch_cls_zoo.criterions.tables import ClassWeight, ThresholdWeight

FAMILIES = ("softmax", "sigmoid")
NAMES = ("weighted", "threshold", "ohm", "ghm")


def build_criterion(
    names: Iterable[str] = (),
    *,
    family: str = "softmax",
    num_classes: int,
    matrices: Matrices | None = None,
    hard_ratio: float = 0.7,
    bins: int = 30,
    momentum: float = 0.75,
    ghm_counts: str = "loss",
    smoothing: float = 0.0,
) -> Criterion:
    """Make a criterion of any combination of weights.

    Args:
        names: out of ``weighted``, ``threshold``, ``ohm``, ``ghm``; none is the plain family.
        family: ``softmax`` or ``sigmoid`` (also called ``bce``: K yes-or-no questions).
        num_classes: K, 2 or more.
        matrices: for ``weighted`` (needed) and ``threshold`` (the published ones by default).
        hard_ratio: share of the hardest that ``ohm`` keeps, in (0, 1].
        bins: of ``ghm``.
        momentum: of ``ghm``, in [0, 1).
        ghm_counts: ``loss`` or ``original``, see :class:`GHMWeight`.
        smoothing: share of a label that training deals out to all classes, in [0, 1).

    Raises:
        ValueError: an unknown name or family, a matrix that is missing or of another size, a value
            out of range.
    """
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in NAMES]:
        raise ValueError(f"criterion {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    family = "sigmoid" if family == "bce" else family
    if family not in FAMILIES:
        raise ValueError(f"criterion family {family!r}, expected softmax, sigmoid or bce")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2 or more")
    table = matrices or Matrices.defaults(num_classes)
    if len(table.low) != num_classes:
        raise ValueError(
            f"class matrices are {len(table.low)} x {len(table.low)}, expected {num_classes} x "
            f"{num_classes} for {num_classes} classes"
        )
    weights: dict[str, nn.Module] = {}
    if "threshold" in wanted:
        weights["threshold"] = ThresholdWeight(table.low, table.up)
    if "weighted" in wanted:
        if table.weights is None:
            raise ValueError("criterion weighted needs a class matrix, expected a YAML file of it")
        weights["weighted"] = ClassWeight(table.weights)
    if "ohm" in wanted:
        weights["ohm"] = OHMWeight(hard_ratio, by_sample=family == "softmax")
    if "ghm" in wanted:
        weights["ghm"] = GHMWeight(
            bins=bins, momentum=momentum, softmax=family == "softmax", counts=ghm_counts
        )
    return Criterion(family, num_classes, weights, smoothing)


class Criterion(nn.Module):
    """See the module; made by :func:`build_criterion`.

    In training mode OHM selects and GHM-C learns the density of its bins. In evaluation mode the
    density is frozen and OHM keeps everything, so that the loss of a sample does not depend on the
    batch it happens to be in.
    """

    def __init__(
        self, family: str, num_classes: int, weights: dict[str, nn.Module], smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.family = family
        self.num_classes = num_classes
        self.weights = nn.ModuleDict(weights)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the family makes of logits ``(N, K)``: rows sum to 1 only with softmax."""
        logits = logits.float()
        return logits.softmax(dim=1) if self.family == "softmax" else logits.sigmoid()

    def soft_targets(self, targets: Tensor) -> Tensor:
        """Class numbers ``(N,)`` as one-hot float ``(N, K)``; soft targets stay as they are."""
        if targets.ndim == 1:
            return F.one_hot(targets, self.num_classes).float()
        return targets.float()

    def term_weights(
        self, logits: Tensor, targets: Tensor, counted: Tensor | None = None
    ) -> Tensor:
        """``G`` of shape ``(N, K)``, without gradient. In training mode GHM-C learns from it.

        Args:
            counted: bool ``(N,)``, samples that have a part in the loss; None is all.
        """
        with torch.no_grad():
            probs = self.probabilities(logits)
            product = torch.ones_like(probs)
            for weight in self.weights.values():
                product = product * weight(probs, targets, counted)
        return product

    def per_sample(
        self, logits: Tensor, targets: Tensor, *, sample_weights: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, shape ``(N,)``, in nats; its mean is the criterion.

        Call this or the criterion once a step, not both: GHM-C learns in either.

        Args:
            logits: float, shape ``(N, K)``.
            targets: int64 ``(N,)``, or soft targets float ``(N, K)``; detached.
            sample_weights: float ``(N,)``, ``u``; 0 takes a sample out. None is 1 for all.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(logits, targets, sample_weights)
        target = self.soft_targets(targets.detach())
        counted = None if sample_weights is None else sample_weights > 0
        weight = self.term_weights(logits.detach(), target, counted)
        if self.training and targets.ndim == 1:  # teachers' answers are soft already
            target = target * (1 - self.smoothing) + self.smoothing / self.num_classes
        logits = logits.float()
        if self.family == "softmax":
            terms = -target * F.log_softmax(logits, dim=1)
        else:
            terms = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        losses = (weight * terms).sum(dim=1)
        return losses if sample_weights is None else losses * sample_weights

    def forward(
        self, logits: Tensor, targets: Tensor, *, sample_weights: Tensor | None = None
    ) -> Tensor:
        """Mean of :meth:`per_sample` over the batch, a scalar in nats."""
        return self.per_sample(logits, targets, sample_weights=sample_weights).mean()

    def _check(self, logits: Tensor, targets: Tensor, sample_weights: Tensor | None) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not len(logits):
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}, expected (N, {self.num_classes})"
            )
        if targets.shape not in (logits.shape, logits.shape[:1]):
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, expected {tuple(logits.shape)} or "
                f"({len(logits)},)"
            )
        if sample_weights is not None and sample_weights.shape != logits.shape[:1]:
            raise ValueError(
                f"sample weights have shape {tuple(sample_weights.shape)}, "
                f"expected ({len(logits)},)"
            )
