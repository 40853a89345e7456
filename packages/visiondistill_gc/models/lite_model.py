"""EfficientNet-lite as teacher or student: its first blocks frozen, and run by Paddle Inference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F  # noqa: N812

from shared_core.for_paddle.efficientnet_lite import EfficientNetLite
from shared_core.for_paddle.export import export_inference
from shared_core.for_paddle.inference import paddle_inference


class Lite(EfficientNetLite):
    """The core's network in units: the stem, each block, the last convolution; then the head.

    Args:
        variant: ``efficientnet_lite0``, ``1`` or ``2``.
        num_classes: at least 2.
        frozen: units that do not learn.
        freeze_bn: keep the statistics of the frozen units, too.
        dropout: before the head, in [0, 1).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        variant: str,
        *,
        num_classes: int,
        frozen: int = 0,
        freeze_bn: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(variant, num_classes=num_classes, drop_rate=dropout)
        count = len(self.units())
        if not 0 <= frozen <= count:
            raise ValueError(f"frozen is {frozen}, expected 0 to {count} units of {variant}")
        self.frozen, self.freeze_bn = frozen, freeze_bn
        self._front: Callable[..., Any] | None = None
        for layer in self.frozen_layers():
            for parameter in layer.parameters():
                parameter.stop_gradient = True
                parameter.trainable = False

    def units(self) -> list[tuple[nn.Layer, ...]]:
        """What is frozen one after the other, in the order of the pass."""
        blocks = [(block,) for stage in self.blocks for block in stage]
        return [(self.conv_stem, self.bn1), *blocks, (self.conv_head, self.bn2)]

    def frozen_layers(self) -> list[nn.Layer]:
        """Layers of the units that do not learn."""
        return [layer for unit in self.units()[: self.frozen] for layer in unit]

    def train(self) -> None:
        """Training mode, except for the batch norms whose statistics are to stay."""
        super().train()
        for layer in self.frozen_layers() if self.freeze_bn else ():
            layer.eval()

    def passed(self, x: Tensor, first: int, last: int) -> Tensor:
        """``x`` through the units ``first`` to ``last - 1``."""
        for unit in self.units()[first:last]:
            for layer in unit:
                x = layer(x)
            if len(unit) == 2:  # a convolution and its norm; blocks have their own activations
                x = F.relu6(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, 1280, ceil(H / 32), ceil(W / 32))``."""
        if self._front is None:
            return self.passed(x, 0, len(self.units()))
        front = paddle.to_tensor(self._front(x.numpy()))
        return self.passed(front, self.frozen, len(self.units()))

    def hasten(self, folder: Path, *, input_size: int, threads: int) -> None:
        """Run the frozen units through Paddle Inference, about three times faster on a CPU.

        Args:
            folder: for the exported files.
            input_size: side of the images, pixels.
        """
        if not self.frozen or not self.freeze_bn:
            return
        folder.mkdir(parents=True, exist_ok=True)
        export_inference(Front(self), folder / "front", input_size=(3, input_size, input_size))
        self._front = paddle_inference(folder / "front", threads=threads)


class Front(nn.Layer):
    """The frozen units alone."""

    def __init__(self, net: Lite) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to what the first learning unit sees."""
        return self.net.passed(images, 0, self.net.frozen)
