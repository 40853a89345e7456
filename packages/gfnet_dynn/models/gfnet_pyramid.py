"""The four-stage GFNet: the token grid halves and the channels grow between stages.

State-dict names and shapes are the official ones, see :mod:`gfnet_dynn.models.gfnet`.

Source: Rao et al. 2021, arXiv:2107.00645, section 3.3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gfnet_dynn.models.gfnet import Block, PatchEmbed, init_weights
from gfnet_dynn.models.global_filter import DftTables, check_form

PYRAMIDS = {  # name: embed_dim, depth, initial LayerScale, drop_path_rate of the ImageNet recipe
    "gfnet-h-ti": ((64, 128, 256, 512), (3, 3, 10, 3), 1e-3, 0.1),
    "gfnet-h-s": ((96, 192, 384, 768), (3, 3, 10, 3), 1e-5, 0.2),
    "gfnet-h-b": ((96, 192, 384, 768), (3, 3, 27, 3), 1e-6, 0.4),
}


class Downsample(nn.Module):
    """Between two stages: a 2x2 convolution of stride 2 on the grid of tokens."""

    def __init__(self, grid: tuple[int, int], channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.grid_in = grid
        self.grid = (grid[0] // 2, grid[1] // 2)
        self.proj = nn.Conv2d(channels_in, channels_out, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        n, _, channels = x.shape
        x = x.view(n, *self.grid_in, channels).permute(0, 3, 1, 2)
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class GFNetPyramid(nn.Module):
    """Four stages of LayerScale blocks; arguments as for ``GFNet``, dims and depths per stage."""

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int] = 4,
        num_classes: int,
        embed_dim: Sequence[int],
        depth: Sequence[int],
        mlp_ratio: float = 4,
        layer_scale: float = 1e-3,
        drop_path_rate: float = 0,
        filter: str = "auto",
    ) -> None:
        super().__init__()
        if len(embed_dim) != len(depth) or not depth or min(*embed_dim, *depth) < 1:
            raise ValueError(
                f"embed_dim, depth: got {embed_dim!r} and {depth!r}, "
                "expected as many positive widths as depths"
            )
        self.num_classes, self.embed_dim, self.depth = num_classes, embed_dim[-1], tuple(depth)
        self.embed_dims, self.mlp_ratio = tuple(embed_dim), mlp_ratio
        self.layer_scale, self.drop_path_rate = layer_scale, drop_path_rate
        self.filter_form = check_form(filter)
        embeds: list[nn.Module] = [PatchEmbed(img_size, patch_size, embed_dim[0])]
        self.img_size, self.patch_size = embeds[0].img_size, embeds[0].patch_size
        self.grid = embeds[0].grid
        for before, after in zip(embed_dim[:-1], embed_dim[1:], strict=True):
            if min(embeds[-1].grid) < 2:
                raise ValueError(
                    f"img_size: got {self.img_size}, too small for {len(depth)} stages "
                    f"with patch {self.patch_size}"
                )
            embeds.append(Downsample(embeds[-1].grid, before, after))
        self.patch_embed = nn.ModuleList(embeds)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim[0]))
        last = max(sum(depth) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depth))])
        stages = []
        for embed, channels, count in zip(embeds, embed_dim, depth, strict=True):
            tables = DftTables(embed.grid)
            stages.append(
                nn.Sequential(
                    *(
                        Block(
                            channels,
                            embed.grid,
                            mlp_ratio=mlp_ratio,
                            drop_path=next(rates),
                            form=filter,
                            tables=tables,
                            layer_scale=layer_scale,
                        )
                        for _ in range(count)
                    )
                )
            )
        self.blocks = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def config(self) -> dict:
        """What rebuilds this network, as plain JSON: ``GFNetPyramid(**config)``."""
        return {
            "img_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "num_classes": self.num_classes,
            "embed_dim": list(self.embed_dims),
            "depth": list(self.depth),
            "mlp_ratio": self.mlp_ratio,
            "layer_scale": self.layer_scale,
            "drop_path_rate": self.drop_path_rate,
            "filter": self.filter_form,
        }

    def set_filter(self, form: str) -> None:
        """Compute every global filter by another form; weights stay as they are."""
        check_form(form)
        for stage in self.blocks:
            for block in stage:
                block.filter.set_form(form)
        self.filter_form = form

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, L, C)`` of the last stage to an embedding ``(N, C)``."""
        return self.norm(tokens).mean(dim=1)

    def tokens(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to the tokens ``(N, L, C)`` after the last stage."""
        x = self.patch_embed[0](x) + self.pos_embed
        for index, stage in enumerate(self.blocks):
            x = stage(self.patch_embed[index](x) if index else x)
        return x

    def embed(self, x: Tensor) -> Tensor:
        """Images to embeddings ``(N, C)``."""
        return self.pool(self.tokens(x))

    def forward(self, x: Tensor, embed: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images to logits ``(N, K)``; with ``embed`` to (embeddings, logits)."""
        embedding = self.embed(x)
        logits = self.head(embedding)
        return (embedding, logits) if embed else logits
