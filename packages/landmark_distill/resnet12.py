"""ResNet12 widened to 1024 features: a stem, four residual stages, DropBlock in the last two."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.recompute import run_block

SMALLEST = 32  # pixels: five halvings leave one


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


class Block(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut, then half the size and some dropout.

    Args:
        inputs: channels in.
        outputs: channels out.
        drop_rate: share of the map that is dropped in training.
        drop_block: side of the dropped squares; 0 drops single values.
    """

    def __init__(self, inputs: int, outputs: int, *, drop_rate: float, drop_block: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.drop_rate = drop_rate
        self.drop = DropBlock(drop_block) if drop_block else None

    def forward(self, x: Tensor, progress: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H // 2, W // 2)``; ``progress`` in [0, 1]."""
        y = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        y = F.leaky_relu(self.bn2(self.conv2(y)), 0.1)
        y = self.bn3(self.conv3(y))
        y = F.max_pool2d(F.leaky_relu(y + self.downsample(x), 0.1), 2)
        if self.drop is not None:  # begins at nothing: early on the map has nothing to spare
            return self.drop(y, self.drop_rate * progress)
        return F.dropout(y, self.drop_rate, self.training)


class ResNet12(nn.Module):
    """The convolutional student.

    Args:
        feature_dim: features, 1024 in the recipe; the stages have 1/8, 1/4, 1/2 and all of it.
        drop_rate: share dropped after each stage, 0.1 in the recipe.
        drop_block: side of the squares in the last two stages, 5 in the recipe; 0 for none.
        drop_block_steps: forward passes until they drop ``drop_rate``, 40,000 in the recipe.

    The buffer ``steps`` counts the forward passes in training mode. It is saved with the weights.

    Raises:
        ValueError: a value out of range.

    Source: Lee et al. 2019, arXiv:1904.03758 (the few-shot ResNet12), section 4.1.
    """

    smallest = SMALLEST

    def __init__(
        self,
        feature_dim: int = 1024,
        *,
        drop_rate: float = 0.1,
        drop_block: int = 5,
        drop_block_steps: int = 40_000,
    ) -> None:
        if feature_dim < 8 or feature_dim % 8:
            raise ValueError(f"feature_dim is {feature_dim}, expected a multiple of 8")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, expected 0 <= drop_rate < 1")
        if drop_block < 0 or drop_block_steps < 1:
            raise ValueError(
                f"drop_block and drop_block_steps are {drop_block} and {drop_block_steps}, "
                "expected at least 0 and 1"
            )
        super().__init__()
        widths = [feature_dim // 8, feature_dim // 4, feature_dim // 2, feature_dim]
        self.feature_dim, self.checkpointing = feature_dim, False
        self.drop_block_steps = drop_block_steps
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        blocks = [
            Block(before, after, drop_rate=drop_rate, drop_block=drop_block if last else 0)
            for before, after, last in zip(
                [widths[0], *widths], widths, [False, False, True, True], strict=False
            )
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = blocks
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)``, at least 32 pixels a side, to features ``(N, feature_dim)``."""
        if self.training:  # here and not in a block, which checkpointing runs twice
            self.steps += 1
        progress = (self.steps / self.drop_block_steps).clamp(max=1.0)
        x = self.stem(images)
        for block in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_block(block, x, progress, again=self.checkpointing)
        return x.mean(dim=(2, 3))
