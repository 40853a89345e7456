"""What happens to a whole training batch on the device: mixup, cutmix, another size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from shared_core.datasets import view_rng
from shared_core.datasets.views.mixing import Mix, draw_cutmix, draw_mixup
from shared_core.for_torch import mixing

SCALE_SPREAD = 0.15  # largest change of the side, as a share of it: two standard deviations


@dataclass(frozen=True)
class BatchPlan:
    """What one batch goes through."""

    mix: Mix | None
    size: tuple[int, int]  # height and width after scaling, pixels


class BatchOps:
    """Draws and applies the changes of a batch; a draw depends on (seed, step) alone.

    Args:
        size: height and width of the batches, pixels.
        mixup, cutmix: whether to; with both one of them is drawn for each batch.
        ratio: probability that a batch is mixed at all.
        mixup_alpha, cutmix_alpha: of the Beta distributions of the shares.
        multi_scale: give each batch a size of its own.
        seed: of all draws.

    Raises:
        ValueError: a probability outside [0, 1] or an alpha that is not positive.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        mixup: bool = False,
        cutmix: bool = False,
        ratio: float = 0.5,
        mixup_alpha: float = 1.1,
        cutmix_alpha: float = 1.0,
        multi_scale: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"mixup_ratio is {ratio}, expected a probability in [0, 1]")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not alpha > 0:
                raise ValueError(f"{name} is {alpha}, expected more than 0")
        self.size, self.ratio, self.seed = size, ratio, seed
        self.methods = [n for n, on in (("mixup", mixup), ("cutmix", cutmix)) if on]
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.multi_scale = multi_scale

    def draw(self, step: int, batch_size: int, *, rank: int = 0) -> BatchPlan:
        """The plan of batch number ``step`` of the run; the size is the same for all ranks."""
        mix = None
        if self.methods:
            rng = view_rng(self.seed, f"mix{rank}", step)
            if rng.random() < self.ratio:
                method = self.methods[int(rng.integers(len(self.methods)))]
                if method == "mixup":
                    mix = draw_mixup(rng, batch_size, alpha=self.mixup_alpha)
                else:
                    height, width = self.size
                    mix = draw_cutmix(
                        rng, batch_size, alpha=self.cutmix_alpha, height=height, width=width
                    )
        size = self.size
        if self.multi_scale:
            size = scaled_size(self.size, view_rng(self.seed, "scale", step))
        return BatchPlan(mix, size)

    def apply(self, images: Tensor, plan: BatchPlan) -> Tensor:
        """The batch ``(N, 3, H, W)``, mixed and scaled to ``plan.size``."""
        if plan.mix is not None:
            if plan.mix.box is None:
                images = mixing.mixup(images, lam=plan.mix.lam, permutation=plan.mix.permutation)
            else:
                images = mixing.cutmix(images, box=plan.mix.box, permutation=plan.mix.permutation)
        if tuple(images.shape[2:]) != plan.size:
            images = F.interpolate(images, size=plan.size, mode="bilinear", align_corners=False)
        return images


def scaled_size(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """A size of the same shape, up to 15 % smaller or larger.

    The width is normal around its own with a deviation of half the largest change, cut off at two
    deviations; the height follows it.
    """
    height, width = size
    drawn = rng.standard_normal()
    while abs(drawn) > 2:
        drawn = rng.standard_normal()
    new_width = max(1, round(width * (1 + SCALE_SPREAD / 2 * drawn)))
    return max(1, round(new_width * height / width)), new_width


def mixed_targets(targets: Tensor, mix: Mix, *, num_classes: int) -> Tensor:
    """Targets, class numbers or shares, mixed like the images: float ``(N, C)``."""
    if targets.ndim == 1:
        targets = mixing.one_hot(targets, num_classes=num_classes)
    return mixing.mix_targets(targets, lam=mix.lam, permutation=mix.permutation)


def permuted(targets: Tensor, mix: Mix) -> Tensor:
    """The targets of each image's partner."""
    return targets[torch.as_tensor(mix.permutation, device=targets.device)]
