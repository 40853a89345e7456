"""DropBlock: drop whole squares of a feature map, for neighbouring pixels say the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows


def block_mask(seeds: Tensor, block: int) -> Tensor:
    """Ones where a map is kept: zero is exactly the union of the seeded blocks.

    Args:
        seeds: ``(N, C, H - block + 1, W - block + 1)``, 1 where a block has its upper left corner.
        block: side of a block, pixels.

    Returns:
        ``(N, C, H, W)`` of the seeds' dtype, 0 or 1.
    """
    edge = block - 1
    padded = F.pad(seeds, (edge, edge, edge, edge))
    return 1 - F.max_pool2d(padded, kernel_size=block, stride=1)


class DropBlock(nn.Module):
    """Zero random ``block x block`` squares, each channel its own; nothing in eval mode.

    What is left is scaled up by the share that was dropped in this batch, so that the mean stays.
    A map smaller than the block takes blocks of its own size.

    Args:
        block: side of a block, pixels.

    Source: Ghiasi et al. 2018, arXiv:1810.12890, algorithm 1 and equation 1.
    """

    def __init__(self, block: int) -> None:
        if block < 1:
            raise ValueError(f"drop block is {block}, expected at least 1 pixel")
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, drop: Tensor | float) -> Tensor:
        """``x`` of shape ``(N, C, H, W)`` with the share ``drop`` in [0, 1) to be dropped."""
        if not self.training:
            return x
        n, channels, height, width = x.shape
        block = min(self.block, height, width)
        places = (height - block + 1, width - block + 1)
        seed_rate = drop / block**2 * (height * width) / (places[0] * places[1])
        seeds = torch.rand(n, channels, *places, device=x.device) < seed_rate
        keep = block_mask(seeds.to(x.dtype), block)
        # Counted in float32: half precision cannot count to a million.
        share = keep.float().mean().clamp_min(1e-6).to(x.dtype)
        return x * keep / share

    def extra_repr(self) -> str:
        return f"block={self.block}"
