"""Swin Transformer for features: the teacher and the widened Swin-tiny, at any image size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.recompute import run_block

PATCH = 4  # pixels
MASKED = -100.0  # added to a score that must not count: exp(-100) is nothing


def window_groups(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Which tokens of a window may look at each other, or None where all may.

    After the shift a window at the border holds parts that do not lie side by side in the map, and
    tokens that only fill a map up to whole windows. Each of these is a group of its own.

    Args:
        size: rows and columns of the map that are real.
        window: rows and columns of a window.
        shift: how far the map is rolled up and to the left.

    Returns:
        bool, ``(windows, tokens, tokens)``: True where two tokens are of one group.
    """
    padded = [-(-length // side) * side for length, side in zip(size, window, strict=True)]
    if not any(shift) and tuple(padded) == tuple(size):
        return None
    marks = []
    for length, whole, side, step in zip(size, padded, window, shift, strict=True):
        place = torch.arange(whole, device=device)
        origin = (place + step) % whole  # where the token at this place lay before the roll
        # 0 inside, 1 and 2 on both sides of the seam, 3 for filled-up tokens.
        mark = (
            (place >= whole - side).long() + (place >= whole - step).long() if step else place * 0
        )
        marks.append(torch.where(origin >= length, 3, mark))
    group = marks[0][:, None] * 4 + marks[1][None, :]  # (rows, columns)
    group = torch.where((marks[0] == 3)[:, None] | (marks[1] == 3)[None, :], 15, group)
    rows, columns = (whole // side for whole, side in zip(padded, window, strict=True))
    group = group.view(rows, window[0], columns, window[1]).transpose(1, 2)
    group = group.reshape(rows * columns, window[0] * window[1])
    return group[:, :, None] == group[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a bias for the relative position of two tokens.

    Args:
        width: channels.
        heads: they divide ``width``.
        window: rows and columns.
    """

    relative_position_index: Tensor

    def __init__(self, width: int, *, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        rows, columns = window
        table = torch.zeros((2 * rows - 1) * (2 * columns - 1), heads)
        self.relative_position_bias_table = nn.Parameter(table)
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        apart = place[:, None] - place[None, :] + torch.tensor([rows - 1, columns - 1])
        index = apart[..., 0] * (2 * columns - 1) + apart[..., 1]  # (tokens, tokens)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """Windows ``(N, windows, tokens, width)`` to the same shape; see :func:`window_groups`."""
        n, windows, tokens, width = x.shape
        qkv = self.qkv(x).view(n, windows, tokens, 3, self.heads, width // self.heads)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1)  # (heads, tokens, tokens)
        if groups is None:
            qkv = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)  # (3, N * windows, heads, tokens, -1)
            bias = bias[None]
        else:  # windows differ, images do not: let the mask repeat over the images
            qkv = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # (3, N, windows * heads, tokens, -1)
            hidden = torch.zeros_like(groups, dtype=bias.dtype).masked_fill(~groups, MASKED)
            bias = (bias[None] + hidden[:, None]).flatten(0, 1)[None]
        query, key, value = qkv.unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        out = out.reshape(n, windows, self.heads, tokens, width // self.heads)
        return self.proj(out.transpose(2, 3).reshape(n, windows, tokens, width))


class DropPath(nn.Module):
    """Leave a branch out for some images of the batch, in training only.

    Source: Huang et al. 2016, arXiv:1603.09382, section 3.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention in (shifted) windows, then an MLP, each on a normalised branch."""

    groups: Tensor | None

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        size: tuple[int, int],
        window: tuple[int, int],
        shifted: bool,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        # A map no larger than the window is one window, and there is nowhere to shift it.
        self.window = (min(window[0], size[0]), min(window[1], size[1]))
        self.shifted, self.size = shifted, size
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads=heads, window=self.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)
        groups = window_groups(size, self.window, self.shift(size), torch.device("cpu"))
        self.register_buffer("groups", groups, persistent=False)

    def shift(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that a map of ``size`` tokens is rolled by."""
        if not self.shifted:
            return 0, 0
        rows, columns = (
            side // 2 if length > side else 0
            for length, side in zip(size, self.window, strict=True)
        )
        return rows, columns

    def attend(self, x: Tensor) -> Tensor:
        """Attention over a map ``(N, H, W, width)``, filled up to whole windows."""
        n, height, width, channels = x.shape
        rows, columns = self.window
        shift = self.shift((height, width))
        groups = self.groups
        if (height, width) != self.size:
            groups = window_groups((height, width), self.window, shift, x.device)
        below, right = -height % rows, -width % columns
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        down, across = (height + below) // rows, (width + right) // columns
        x = x.view(n, down, rows, across, columns, channels).transpose(2, 3)
        x = self.attn(x.reshape(n, down * across, rows * columns, channels), groups)
        x = x.view(n, down, across, rows, columns, channels).transpose(2, 3)
        x = x.reshape(n, height + below, width + right, channels)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Half the rows and columns, twice the channels: four neighbours become one token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H, W, width)`` to ``(N, ceil(H / 2), ceil(W / 2), 2 * width)``."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column, row in itertools.product((0, 1), (0, 1))]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class PatchEmbed(nn.Module):
    """Squares of 4 x 4 pixels to normalised tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, ceil(H / 4), ceil(W / 4), width)``."""
        height, width = images.shape[2:]
        if height % PATCH or width % PATCH:
            images = F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks at one resolution; all stages but the last end by merging."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class SwinTransformer(nn.Module):
    """Images to features: four stages, a last norm, the mean over the tokens.

    Weights have the names of Microsoft's first release, so that its files fit. Masks and position
    indices are worked out, not saved. For image sizes that make whole windows the output is that
    of timm's and torchvision's Swin; for others the tokens that fill up a window are never looked
    at (there, timm and torchvision let them count, each in its own place).

    Args:
        embed_dim: channels of the first stage; features are 8 times as many.
        depths: blocks of the four stages.
        heads: heads of the four stages; they divide the channels.
        image_size: pixels, a side or (height, width); others work as well, with the same windows.
        window: side of a window in tokens; None for 1/32 of the image (384: 12, 224: 7).
        mlp_ratio: inner width of an MLP.
        drop_path: rate of the last block; it grows linearly from 0.

    Raises:
        ValueError: a value out of range, or heads that do not divide.

    Source: Liu et al. 2021, arXiv:2103.14030, section 3.
    """

    smallest = PATCH

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        image_size: int | tuple[int, int] = 384,
        window: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
    ) -> None:
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if window is None:
            window = max(1, round(min(sides) / 32))
        if min(sides) < PATCH or window < 1 or not 0 <= drop_path < 1:
            raise ValueError(
                f"image_size {image_size}, window {window}, drop_path {drop_path}: expected at "
                f"least {PATCH} pixels, at least 1 token, and 0 <= drop_path < 1"
            )
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        if len(depths) != len(heads) or any(w % h for w, h in zip(widths, heads, strict=False)):
            raise ValueError(f"heads are {tuple(heads)}, expected divisors of {tuple(widths)}")
        super().__init__()
        self.feature_dim, self.checkpointing = widths[-1], False
        self.patch_embed = PatchEmbed(embed_dim)
        blocks_in_all = sum(depths)
        rates = iter(drop_path * i / max(1, blocks_in_all - 1) for i in range(blocks_in_all))
        size = (-(-sides[0] // PATCH), -(-sides[1] // PATCH))
        stages = []
        for number, (width, depth, count) in enumerate(zip(widths, depths, heads, strict=True)):
            blocks = [
                SwinBlock(
                    width,
                    heads=count,
                    size=size,
                    window=(window, window),
                    shifted=place % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                )
                for place in range(depth)
            ]
            last = number == len(depths) - 1
            stages.append(Stage(blocks, None if last else PatchMerging(width)))
            size = (-(-size[0] // 2), -(-size[1] // 2))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(widths[-1])
        for name, parameter in self.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to features ``(N, feature_dim)``."""
        x = self.patch_embed(images)  # (N, H / 4, W / 4, embed_dim)
        for stage in self.layers:
            for block in stage.blocks:
                x = run_block(block, x, again=self.checkpointing)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.norm(x).mean(dim=(1, 2))
