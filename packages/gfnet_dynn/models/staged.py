"""EfficientNet-lite as a row of blocks with features after each, so that exits can sit on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gfnet_dynn.models.named import NamedNetwork
from shared_core.for_torch.cost import layer_costs


class StagedNetwork(NamedNetwork):
    """The same network, answers and weights; its last block is the convolution before the head.

    Attributes:
        depth: inverted residual blocks and that convolution.
        widths: channels after each block.

    Args:
        words: see :class:`NamedNetwork`; a network of the core.
    """

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)
        body = self.body
        rows = [block for stage in body.blocks for block in stage]
        last = nn.Sequential(body.conv_head, body.bn2, nn.ReLU6())
        self.blocks = (*rows, last)  # no module list: the body has registered all of them
        self.depth = len(self.blocks)
        ends = [block.conv_pwl if block.expands else block.conv_pw for block in rows]
        self.widths = (*(end.out_channels for end in ends), body.num_features)

    def stem(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to the map ``(N, C, h, w)`` that enters the first block."""
        x = (x * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        return nn.functional.relu6(self.body.bn1(self.body.conv_stem(x)))

    def pool(self, tokens: Tensor) -> Tensor:
        """A map ``(N, C, h, w)`` after any block to an embedding ``(N, C)``."""
        return tokens.mean(dim=(2, 3))

    def block_tokens(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Images to the maps after each of ``blocks`` (0-based), in one pass."""
        kept, x = {}, self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in blocks:
                kept[index] = x
        return [kept[index] for index in blocks]

    def token_shape(self, block: int) -> tuple[int, ...]:
        """Of one image's map after ``block``: channels, rows, columns."""
        image = torch.zeros(1, 3, *self.img_size, device=self.scale.device)
        with torch.no_grad():
            return tuple(self.eval().block_tokens(image, [block])[0].shape[1:])

    def forward(self, x: Tensor, embed: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images to logits; with ``embed`` to (embeddings ``(N, D)``, logits)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        features = self.pool(x)
        logits = self.head(features)
        return (features, logits) if embed else logits

    def block_macs(self) -> list[int]:
        """MACs of each block for one image; the stem's are the first block's."""
        names = {id(module): name for name, module in self.named_modules()}
        image = torch.zeros(1, 3, *self.img_size, device=self.scale.device)
        layers = layer_costs(self, image)

        def within(prefix: str) -> int:
            return sum(one.macs for one in layers if f"{one.name}.".startswith(f"{prefix}."))

        rows = [within(names[id(block)]) for block in self.blocks[:-1]]
        rows[0] += within("body.conv_stem")
        return [*rows, within("body.conv_head")]
