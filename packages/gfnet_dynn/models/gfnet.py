"""GFNet: patches, global filters and MLPs, mean pooling, one linear head.

The state dict has the names and shapes of the official release, so its files load strictly.

Source: Rao et al. 2021, arXiv:2107.00645; sizes and names: github.com/raoyongming/GFNet (MIT).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gfnet_dynn.models.global_filter import DftTables, GlobalFilter, check_form

ISOTROPIC = {  # name: embed_dim, depth, drop_path_rate of the ImageNet recipe
    "gfnet-ti": (256, 12, 0.0),
    "gfnet-xs": (384, 12, 0.0),
    "gfnet-s": (384, 19, 0.15),
    "gfnet-b": (512, 19, 0.25),
}


def pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    """``3`` or ``(2, 3)`` as two positive integers (height, width)."""
    sides = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{what}: got {value!r}, expected a positive integer or two of them")
    return sides


class DropPath(nn.Module):
    """Stochastic depth: while training, drop a residual branch per sample and rescale the others.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate: got {rate}, expected [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.rand(x.shape[0], *([1] * (x.dim() - 1)), device=x.device) < keep
        return x * mask.to(x.dtype) / keep


class PatchEmbed(nn.Module):
    """Cut images ``(N, 3, H, W)`` into patches and project them: tokens ``(N, h w, C)``.

    ``h = H // patch``; pixels that fill no patch are dropped on the right and at the bottom, as the
    original does (600 px with patch 16: 37 x 37 tokens from 592 px).
    """

    def __init__(
        self, img_size: int | Sequence[int], patch_size: int | Sequence[int], channels: int
    ) -> None:
        super().__init__()
        self.img_size = pair(img_size, "img_size")
        self.patch_size = pair(patch_size, "patch_size")
        self.grid = (
            self.img_size[0] // self.patch_size[0],
            self.img_size[1] // self.patch_size[1],
        )
        if min(self.grid) < 1:
            raise ValueError(
                f"img_size: got {self.img_size}, expected at least one patch of {self.patch_size}"
            )
        self.proj = nn.Conv2d(3, channels, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"images: got shape {tuple(x.shape)}, expected (N, 3, {self.img_size[0]}, "
                f"{self.img_size[1]})"
            )
        # Contiguous tokens: added to in place of the permuted ones, every later layer would copy.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class Mlp(nn.Module):
    """Linear to ``ratio C``, exact GELU, Linear back."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, int(channels * ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(channels * ratio), channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """``x + drop_path(gamma * MLP(LN(Filter(LN(x)))))``: one residual around filter and MLP.

    ``gamma`` (LayerScale, per channel) is there only when ``layer_scale`` gives its initial value.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        mlp_ratio: float = 4,
        drop_path: float = 0,
        form: str = "auto",
        tables: DftTables | None = None,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.filter = GlobalFilter(channels, grid, form=form, tables=tables)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, mlp_ratio)
        self.drop_path = DropPath(drop_path)
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale)))
        else:
            self.gamma = None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm2(self.filter(self.norm1(x))))
        if self.gamma is not None:
            branch = self.gamma * branch
        return x + self.drop_path(branch)


def init_weights(module: nn.Module) -> None:
    """Linear: truncated normal of 0.02 and zero bias; LayerNorm: 1 and 0. The rest stays."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class GFNet(nn.Module):
    """The isotropic network: all blocks work on one grid of tokens.

    Args:
        img_size: pixels, one number or (height, width).
        patch_size: pixels, one number or (height, width).
        num_classes: outputs of the head.
        embed_dim: channels ``C``.
        depth: number of blocks.
        mlp_ratio: hidden width of the MLP over ``C``.
        drop_path_rate: of the last block; grows linearly from 0 at the first.
        filter: form of the global filter, see :mod:`gfnet_dynn.models.global_filter`.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int] = 16,
        num_classes: int,
        embed_dim: int,
        depth: int,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0,
        filter: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("embed_dim", embed_dim),
            ("depth", depth),
        ):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.num_classes, self.embed_dim, self.depth = num_classes, embed_dim, depth
        self.mlp_ratio, self.drop_path_rate = mlp_ratio, drop_path_rate
        self.filter_form = check_form(filter)
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.img_size, self.patch_size = self.patch_embed.img_size, self.patch_embed.patch_size
        self.grid = self.patch_embed.grid
        self.widths = (embed_dim,) * depth  # channels after each block
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        tables = DftTables(self.grid)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, self.grid, mlp_ratio=mlp_ratio, drop_path=r, form=filter, tables=tables
            )
            for r in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def config(self) -> dict:
        """What rebuilds this network, as plain JSON: ``GFNet(**config)``."""
        return {
            "img_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "num_classes": self.num_classes,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "mlp_ratio": self.mlp_ratio,
            "drop_path_rate": self.drop_path_rate,
            "filter": self.filter_form,
        }

    def set_filter(self, form: str) -> None:
        """Compute every global filter by another form; weights stay as they are."""
        check_form(form)
        for block in self.blocks:
            block.filter.set_form(form)
        self.filter_form = form

    def stem(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to the tokens ``(N, L, C)`` that enter the first block."""
        return self.patch_embed(x) + self.pos_embed

    def token_shape(self, block: int) -> tuple[int, ...]:
        """Of one image's tokens after any block."""
        return self.grid[0] * self.grid[1], self.embed_dim

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, L, C)`` after any block to an embedding ``(N, C)``: mean of their norm."""
        return self.norm(tokens).mean(dim=1)

    def tokens(self, x: Tensor) -> Tensor:
        """Images to the tokens ``(N, L, C)`` after the last block, before the final norm."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def block_tokens(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Images to the tokens ``(N, L, C)`` after each of ``blocks`` (0-based), in one pass."""
        wanted, kept = set(blocks), {}
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in wanted:
                kept[index] = x
        if missing := wanted - kept.keys():
            raise ValueError(f"blocks: got {sorted(missing)}, expected 0 to {self.depth - 1}")
        return [kept[index] for index in blocks]

    def embed(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to embeddings ``(N, C)``."""
        return self.pool(self.tokens(x))

    def forward(self, x: Tensor, embed: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images ``(N, 3, H, W)`` to logits ``(N, K)``; with ``embed`` to (embeddings, logits)."""
        embedding = self.embed(x)
        logits = self.head(embedding)
        return (embedding, logits) if embed else logits
