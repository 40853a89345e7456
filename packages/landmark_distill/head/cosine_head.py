"""The classifier that teacher and student share: cosine to class weights, margin on the label."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

SCALE = 32.0  # of the published models
MARGIN = 0.1
TINY = 1e-8  # a norm below counts as this
ROWS = 1024  # class weights read at a time


class CosineMarginHead(nn.Module):
    """``logits = scale * (cos(feature, weight_c) - margin * [c = label])``.

    The margin makes the label's class harder to reach while training; it is left out in eval mode
    and without labels. Logits lie in ``[-scale * (1 + margin), scale]``.

    Args:
        num_classes: rows of the weight, ``C``.
        feature_dim: columns, ``D``.
        scale: positive; both teacher and student of the recipe have 32.
        margin: in ``[0, 1)``; both have 0.1.

    Raises:
        ValueError: a value out of range.

    Source: Wang et al. 2018, arXiv:1801.09414 (CosFace), equation 4.
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        scale: float = SCALE,
        margin: float = MARGIN,
    ) -> None:
        if num_classes < 1 or feature_dim < 1:
            raise ValueError(f"head is {num_classes} x {feature_dim}, expected positive numbers")
        super().__init__()
        self._settings(scale, margin)
        self.weight = nn.Parameter(torch.empty(num_classes, feature_dim))  # (C, D)
        nn.init.xavier_uniform_(self.weight)

    def _settings(self, scale: float, margin: float) -> None:
        if not scale > 0:
            raise ValueError(f"scale is {scale}, expected more than 0")
        if not 0 <= margin < 1:
            raise ValueError(f"margin is {margin}, expected 0 <= margin < 1")
        self.scale, self.margin = float(scale), float(margin)
        self._norms: tuple[tuple[object, ...], Tensor | None] | None = None

    @classmethod
    def around(
        cls, weight: Tensor, *, scale: float = SCALE, margin: float = MARGIN
    ) -> CosineMarginHead:
        """A frozen head on this very tensor ``(C, D)``: nothing is copied, so it may be mapped."""
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"head weight is {weight.dtype} {tuple(weight.shape)}, expected floats (C, D)"
            )
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._settings(scale, margin)
        head.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        return head.freeze()

    @property
    def num_classes(self) -> int:
        """``C``."""
        return self.weight.shape[0]

    @property
    def feature_dim(self) -> int:
        """``D``."""
        return self.weight.shape[1]

    @property
    def frozen(self) -> bool:
        """Whether the weight gets no gradient."""
        return not self.weight.requires_grad

    def freeze(self) -> CosineMarginHead:
        """No gradient for the weight from now on. Returns the head."""
        self.weight.requires_grad_(False)
        return self

    def row_scale(self) -> Tensor | None:
        """One over the norm of each class weight, ``(C,)``; None when all of them are unit rows.

        Counted once and kept until the weight changes: reading 250,000 rows takes as long as
        a good part of a small batch.
        """
        weight = self.weight.detach()
        key = (weight.data_ptr(), self.weight._version, weight.dtype, weight.device)
        if self._norms is None or self._norms[0] != key:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            scale = torch.empty(len(weight), dtype=wide, device=weight.device)
            for part, norms in zip(weight.split(ROWS), scale.split(ROWS), strict=True):
                torch.linalg.vector_norm(part, dim=1, dtype=wide, out=norms)
            scale.clamp_min_(TINY).reciprocal_()
            unit = bool(((scale - 1).abs() <= 8 * torch.finfo(wide).eps).all())
            self._norms = (key, None if unit else scale)
        return self._norms[1]

    def cosine(self, features: Tensor) -> Tensor:
        """Cosines ``(N, C)`` of features ``(N, D)`` of any length to all class weights."""
        weight = F.normalize(self.weight, dim=1, eps=TINY)
        return F.normalize(features, dim=1, eps=TINY).to(weight.dtype) @ weight.T

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """All logits; for 250,000 classes use :mod:`landmark_distill.head.streamed_loss` instead.

        Args:
            features: ``(N, D)``, any length.
            labels: int64 ``(N,)`` in ``[0, C)``; used in training mode only.

        Returns:
            ``(N, C)``.
        """
        logits = self.scale * self.cosine(features)
        if self.training and labels is not None and self.margin:
            label = F.one_hot(labels, self.num_classes).to(logits.dtype)
            logits = logits - self.scale * self.margin * label
        return logits

    def extra_repr(self) -> str:
        classes, width = self.weight.shape
        state = ", frozen" if self.frozen else ""
        return f"{classes} x {width}, scale={self.scale:g}, margin={self.margin:g}{state}"
