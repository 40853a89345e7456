"""The plan of EfficientNet-lite: what its twins in torch and Paddle are built from, name for name.

EfficientNet-lite is EfficientNet without squeeze-and-excitation and with ReLU6, made to be
quantized. Stem and head keep their widths when the network is scaled, first and last stage their
depths.

Source: Tan and Le 2019, arXiv:1905.11946, table 1; the lite variants: tensorflow/tpu,
models/official/efficientnet/lite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STEM, HEAD = 32, 1280  # channels
BN_EPS = 1e-3
# Repeats, kernel, stride, expansion, output channels of each stage at width and depth 1.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Width, depth, side in pixels.
VARIANTS = {
    "efficientnet_lite0": (1.0, 1.0, 224),
    "efficientnet_lite1": (1.0, 1.1, 240),
    "efficientnet_lite2": (1.1, 1.2, 260),
}


@dataclass(frozen=True)
class BlockPlan:
    """One inverted residual block.

    Attributes:
        inputs, outputs: channels.
        kernel, stride: of the depthwise convolution.
        expansion: hidden channels are ``inputs * expansion``; 1 leaves the expanding layer out.
        index, count: which block of how many, for a drop path that grows with depth.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int
    index: int
    count: int

    @property
    def hidden(self) -> int:
        """Channels of the depthwise convolution."""
        return self.inputs * self.expansion

    @property
    def residual(self) -> bool:
        """Whether the block's input is added to its output."""
        return self.stride == 1 and self.inputs == self.outputs


def round_channels(channels: float, *, step: int = 8) -> int:
    """The next multiple of ``step``, never more than a tenth below ``channels``."""
    rounded = max(step, int(channels + step / 2) // step * step)
    return rounded if rounded >= 0.9 * channels else rounded + step


def block_plan(variant: str) -> tuple[tuple[BlockPlan, ...], ...]:
    """Stages of blocks of ``efficientnet_lite0``, ``1`` or ``2``.

    Raises:
        ValueError: another name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"network {variant!r}, expected one of {', '.join(VARIANTS)}")
    width, depth, _ = VARIANTS[variant]
    last = len(STAGES) - 1
    repeats = [
        one[0] if stage in (0, last) else math.ceil(one[0] * depth)
        for stage, one in enumerate(STAGES)
    ]
    stages, inputs, index = [], STEM, 0
    for (_, kernel, stride, expansion, wanted), times in zip(STAGES, repeats, strict=True):
        outputs = round_channels(wanted * width)
        blocks = []
        for number in range(times):
            first = number == 0
            blocks.append(
                BlockPlan(
                    inputs if first else outputs,
                    outputs,
                    kernel,
                    stride if first else 1,
                    expansion,
                    index,
                    sum(repeats),
                )
            )
            index += 1
        stages.append(tuple(blocks))
        inputs = outputs
    return tuple(stages)


def same_padding(size: int, *, kernel: int, stride: int) -> tuple[int, int]:
    """Rows before and after an input of ``size`` so that a convolution gives ``ceil(size/stride)``.

    TensorFlow's rule: what is odd goes behind. It differs from symmetric padding where the stride
    is 2 and the size even.
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def timm_names(names: list[str]) -> dict[str, str]:
    """The names of the weights packages -> the names that timm and both twins use.

    The packages number blocks through and name layers after TensorFlow's.

    Raises:
        ValueError: a name that is not of such a file.
    """
    blocks = sorted({int(one.split(".")[1]) for one in names if one.startswith("_blocks.")})
    for variant in VARIANTS:
        plan = [
            (stage, number, block)
            for stage, group in enumerate(block_plan(variant))
            for number, block in enumerate(group)
        ]
        if len(plan) == len(blocks):
            break
    else:
        raise ValueError(f"{len(blocks)} blocks, expected those of an EfficientNet-lite")
    outer = {
        "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
        "_fc": "classifier",
    }  # fmt: skip
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    found = {}
    for name in names:
        parts = name.split(".")
        try:
            if parts[0] == "_blocks":
                stage, number, block = plan[int(parts[1])]
                inner = plain if block.expansion == 1 else expanding
                new = [f"blocks.{stage}.{number}", inner[parts[2]], *parts[3:]]
            else:
                new = [outer[parts[0]], *parts[1:]]
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"weight {name!r}, expected one of an EfficientNet-lite") from None
        found[name] = ".".join(new)
    return found
