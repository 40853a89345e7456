"""What a GFNet costs: parameters and multiply-accumulates (MACs) by formula, per layer and exit.

One MAC is one multiplication with its addition. Linear layers count every token. The conventions
are those that give the published figures: an FFT counts ``n ceil(log2 n)`` a channel and a
LayerNorm 5 an element; GELU, softmax, products of spectra and residual sums count nothing. The
filter counts as an FFT in whatever form it runs, so that a cost means the same on every machine.

Source: Rao et al. 2021, arXiv:2107.00645, table 1.
"""

import numpy as np
from torch import nn

from gfnet_dynn.models.named import NamedNetwork
from gfnet_dynn.models.staged import StagedNetwork
from shared_core.metrics import cost

GATE_INPUTS = 4  # features that a gate's linear layer sees


def block_costs(channels: int, grid: tuple[int, int], *, mlp_ratio: float, name: str) -> list:
    """Layers of one block on a token grid ``(h, w)``; LayerScale, if any, is not in it."""
    h, w = grid
    tokens, hidden = h * w, int(channels * mlp_ratio)
    spectrum = cost.LayerCost(f"{name}.filter", params=2 * h * (w // 2 + 1) * channels)
    return [
        cost.layernorm(tokens, channels, name=f"{name}.norm1"),
        spectrum,
        cost.rfft2(grid, channels, name=f"{name}.filter.rfft2"),
        cost.irfft2(grid, channels, name=f"{name}.filter.irfft2"),
        cost.layernorm(tokens, channels, name=f"{name}.norm2"),
        cost.linear(tokens, channels, hidden, name=f"{name}.mlp.fc1"),
        cost.linear(tokens, hidden, channels, name=f"{name}.mlp.fc2"),
    ]


def layer_costs(model: nn.Module) -> list:
    """``LayerCost`` of every layer of a GFNet or GFNetPyramid, in order, for one image.

    Names are those of the state dict; parameters add up to the model's.
    """
    embeds = model.patch_embed
    embeds = list(embeds) if isinstance(embeds, nn.ModuleList) else [embeds]
    stages = [list(model.blocks)] if len(embeds) == 1 else [list(stage) for stage in model.blocks]
    layers: list = []
    for number, (embed, blocks) in enumerate(zip(embeds, stages, strict=True)):
        several = len(embeds) > 1
        conv = embed.proj
        size = embed.img_size if number == 0 else embed.grid_in
        layers.append(
            cost.conv2d(
                size,
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                stride=conv.stride,
                name=f"patch_embed.{number}" if several else "patch_embed",
            )
        )
        if number == 0:
            layers.append(cost.LayerCost("pos_embed", params=model.pos_embed.numel()))
        for index, block in enumerate(blocks):
            name = f"blocks.{number}.{index}" if several else f"blocks.{index}"
            ratio = block.mlp.fc1.out_features / conv.out_channels
            layers += block_costs(conv.out_channels, embed.grid, mlp_ratio=ratio, name=name)
            if block.gamma is not None:
                layers.append(cost.LayerCost(f"{name}.gamma", params=block.gamma.numel()))
    tokens = embeds[-1].grid[0] * embeds[-1].grid[1]
    return layers + exit_layers(tokens, model.embed_dim, model.num_classes, names=("norm", "head"))


def exit_layers(tokens: int, channels: int, classes: int, *, names: tuple[str, str]) -> list:
    """Final norm over all tokens, then a linear head on their mean."""
    return [
        cost.layernorm(tokens, channels, name=names[0]),
        cost.linear(1, channels, classes, name=names[1]),
    ]


def model_macs(model: nn.Module, *, elementwise: bool = True) -> int:
    """MACs of one image through any network here; LayerNorm counted unless told not to."""
    if isinstance(model, NamedNetwork):
        return model.macs()
    return cost.total_macs(layer_costs(model), elementwise=elementwise)


def _blocks(backbone: nn.Module) -> list[int]:
    """MACs of a GFNet's blocks; cutting into patches is the first block's."""
    found = [0] * backbone.depth
    for layer in layer_costs(backbone):
        top = layer.name.split(".")
        if top[0] in ("blocks", "patch_embed"):
            found[int(top[1]) if top[0] == "blocks" else 0] += layer.macs + layer.elementwise
    return found


def head_layers(backbone: nn.Module, block: int) -> list:
    """What a head after ``block`` computes."""
    classes = backbone.num_classes
    if isinstance(backbone, StagedNetwork):
        return [cost.linear(1, backbone.widths[block], classes, name="head")]
    tokens = backbone.grid[0] * backbone.grid[1]
    return exit_layers(tokens, backbone.embed_dim, classes, names=("norm", "head"))


def exit_costs(model: nn.Module) -> np.ndarray:
    """MACs of an image that leaves at each exit of a GFNetDynn, float64 ``(G+1,)``, rising.

    Each exit passed adds its norm, head and gate; the last entry is a run to the final head.
    """
    backbone = model.backbone
    by_block = backbone.block_macs() if isinstance(backbone, StagedNetwork) else _blocks(backbone)
    ends = [*model.exits, backbone.depth - 1]
    segments, exits, start = [], [], 0
    for index, end in enumerate(ends):
        segments.append(sum(by_block[start : end + 1]))
        here = head_layers(backbone, end)
        if index < len(model.exits) and model.gate_kind == "unc":
            here.append(cost.linear(1, GATE_INPUTS, 1, name=f"gates.{index}"))
        exits.append(cost.total_macs(here, elementwise=True))
        start = end + 1
    return cost.exit_costs(segments, exits)
