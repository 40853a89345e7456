"""Mixed precision as Paddle names it: O0 is fp32, O1 autocasts, O2 also keeps the weights small."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from shared_core.for_paddle.precision import DTYPES, Precision
from shared_core.runs import UsageError

LEVELS = ("O0", "O1", "O2")


class LeveledPrecision(Precision):
    """The core's precision with Paddle's level.

    Args:
        device: ``cpu`` or ``gpu``.
        level: ``O0``, ``O1`` or ``O2``.
        dtype: ``fp16`` or ``bf16``; without effect at ``O0``.

    Raises:
        UsageError: another level than ``O0`` on a CPU, where Paddle would stay in fp32.
    """

    def __init__(self, device: str, *, level: str = "O0", dtype: str = "fp16") -> None:
        if level not in LEVELS:
            raise UsageError(f"--amp {level}: expected one of {', '.join(LEVELS)}")
        if level != "O0" and device.startswith("cpu"):
            raise UsageError(f"--amp {level}: mixed precision needs a GPU, this run is on a CPU")
        super().__init__(device, dtype if level != "O0" else "fp32")
        self.level = level

    def autocast(self) -> Any:
        """Context for the forward pass and the loss."""
        enabled = self.dtype != "fp32"
        dtype: Any = DTYPES[self.dtype] if enabled else "float16"
        return paddle.amp.auto_cast(
            enable=enabled, dtype=dtype, level=self.level if enabled else "O1"
        )

    def decorate(self, net: nn.Layer, optimizer: Any) -> tuple[nn.Layer, Any]:
        """At ``O2``: the network's weights in the low dtype, float32 masters in the optimizer."""
        if self.level != "O2":
            return net, optimizer
        net, optimizer = paddle.amp.decorate(
            models=net, optimizers=optimizer, level="O2", dtype=DTYPES[self.dtype]
        )
        return net, optimizer
