"""Networks of others, trained on ImageNet, as teachers: any that the core knows by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared_core.for_torch.cost import layer_costs
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD
from shared_core.for_torch.networks import Network, head_names, make_network
from shared_core.metrics import cost

NORMS = (nn.modules.batchnorm._BatchNorm,)


class NamedNetwork(nn.Module):
    """Images ``(N, 3, H, W)`` as all networks here take them, to logits ``(N, K)``.

    The normalisation that the weights were trained with is a part of this module. While it learns,
    the statistics of batch norms stay those of the trained weights: those of small batches made
    fine-tuning end below a linear classifier on the very same features.

    Args:
        network: a name of :func:`shared_core.for_torch.networks.find_network`.
        num_classes: K.
        img_size: pixels, ``(height, width)``.
        drop_path_rate: stochastic depth while it learns, in ``[0, 1)``.
        started: the network itself where it is there already, with trained weights for example.

    Raises:
        ValueError: an unknown network, or one that cannot take this size or rate.
    """

    def __init__(
        self,
        *,
        network: str,
        num_classes: int,
        img_size: tuple[int, int],
        drop_path_rate: float = 0.0,
        started: Network | None = None,
    ) -> None:
        super().__init__()
        self.network, self.num_classes = network, num_classes
        self.img_size, self.drop_path_rate = tuple(img_size), drop_path_rate
        self.start = started.start if started else {}  # where its weights are from, plain JSON
        made = started or make_network(
            network,
            num_classes=num_classes,
            image_size=self.img_size,
            drop_path_rate=drop_path_rate,
        )
        self.body = made.model.to(memory_format=torch.channels_last)
        self.head_name = head_names(self.body, num_classes)[0]
        scale = [ours / theirs for ours, theirs in zip(IMAGENET_STD, made.std, strict=True)]
        shift = [
            (ours - theirs) / std
            for ours, theirs, std in zip(IMAGENET_MEAN, made.mean, made.std, strict=True)
        ]
        for name, values in (("scale", scale), ("shift", shift)):
            tensor = torch.tensor(values)[:, None, None]
            self.register_buffer(name, tensor, persistent=False)

    @property
    def head(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.body.get_submodule(self.head_name)

    @property
    def embed_dim(self) -> int:
        """Numbers that the head sees of an image."""
        return int(self.head.weight.shape[1])

    def config(self) -> dict[str, Any]:
        """What rebuilds this network, as plain JSON: ``NamedNetwork(**config)``."""
        return {
            "network": self.network,
            "num_classes": self.num_classes,
            "img_size": list(self.img_size),
            "drop_path_rate": self.drop_path_rate,
        }

    def train(self, mode: bool = True) -> NamedNetwork:
        """As of any module, but batch norms stay as in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, NORMS):
                module.eval()
        return self

    def forward(self, x: Tensor, embed: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images to logits; with ``embed`` to (what the head sees ``(N, D)``, logits)."""
        x = (x * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        if not embed:
            return self.body(x)
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.body(x)
        finally:
            hook.remove()
        return seen[0].flatten(1), logits

    def macs(self) -> int:
        """Multiply-accumulates of one image: convolutions and products of matrices."""
        image = torch.zeros(1, 3, *self.img_size, device=self.scale.device)
        return int(cost.total_macs(layer_costs(self, image), elementwise=False))
