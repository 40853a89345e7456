"""EfficientNet-lite for Paddle; its twin is :mod:`shared_core.for_torch.efficientnet_lite`.

Names are those of the twin, but for Paddle's own names of the statistics of a batch norm.
"""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F  # noqa: N812

from shared_core.weights.efficientnet_lite import (
    BN_EPS,
    HEAD,
    STEM,
    BlockPlan,
    block_plan,
    same_padding,
)


class SameConv(nn.Conv2D):
    """Without bias, padded as TensorFlow: the output's side is ``ceil(side / stride)``.

    It pads within the convolution: of several paddings that stand alone, Paddle2ONNX mixes up the
    sizes, and its file answers at random.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            kernel,
            stride,
            groups=groups,
            weight_attr=nn.initializer.KaimingNormal(
                fan_in=outputs * kernel * kernel // groups, nonlinearity="relu"
            ),
            bias_attr=False,
        )
        self.same = (kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, ceil(H / stride), ceil(W / stride))``."""
        kernel, stride = self.same
        sides = [same_padding(int(side), kernel=kernel, stride=stride) for side in x.shape[2:]]
        pads = [size for side in sides for size in side]  # top, bottom, left, right
        return F.conv2d(x, self.weight, stride=stride, padding=pads, groups=self._groups)


def _norm(channels: int) -> nn.Layer:
    return nn.BatchNorm2D(channels, epsilon=BN_EPS)


def drop_path(x: Tensor, rate: float, *, training: bool) -> Tensor:
    """Leave a block's branch out for a random share ``rate`` of the samples; the rest grows.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """
    if not training or rate == 0:
        return x
    keep = paddle.rand([x.shape[0], 1, 1, 1]) >= rate
    return x * (keep.astype("float32") / (1 - rate)).astype(x.dtype)


class Block(nn.Layer):
    """Expand, convolve each channel, project; the input is added where shapes allow."""

    def __init__(self, plan: BlockPlan, *, drop: float) -> None:
        super().__init__()
        self.residual, self.expands, self.drop = plan.residual, plan.expansion > 1, drop
        hidden = plan.hidden
        depthwise = SameConv(hidden, hidden, plan.kernel, stride=plan.stride, groups=hidden)
        if self.expands:
            self.conv_pw = SameConv(plan.inputs, hidden, 1)
            self.bn1 = _norm(hidden)
            self.conv_dw = depthwise
            self.bn2 = _norm(hidden)
            self.conv_pwl = SameConv(hidden, plan.outputs, 1)
            self.bn3 = _norm(plan.outputs)
        else:
            self.conv_dw = depthwise
            self.bn1 = _norm(hidden)
            self.conv_pw = SameConv(hidden, plan.outputs, 1)
            self.bn2 = _norm(plan.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H', W')``."""
        if self.expands:
            y = F.relu6(self.bn1(self.conv_pw(x)))
            y = F.relu6(self.bn2(self.conv_dw(y)))
            y = self.bn3(self.conv_pwl(y))
        else:
            y = F.relu6(self.bn1(self.conv_dw(x)))
            y = self.bn2(self.conv_pw(y))
        return x + drop_path(y, self.drop, training=self.training) if self.residual else y


class EfficientNetLite(nn.Layer):
    """Images ``(N, 3, H, W)``, normalised, to logits ``(N, K)``.

    Args:
        variant: ``efficientnet_lite0``, ``1`` or ``2``.
        num_classes: K; 0 gives the pooled features ``(N, 1280)`` instead.
        drop_rate: dropout before the classifier, in ``[0, 1)``.
        drop_path_rate: of the last block's branch; it grows linearly from 0 with depth.

    Raises:
        ValueError: another variant.
    """

    def __init__(
        self,
        variant: str = "efficientnet_lite0",
        *,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stages = block_plan(variant)
        self.variant, self.num_features = variant, HEAD
        self.conv_stem = SameConv(3, STEM, 3, stride=2)
        self.bn1 = _norm(STEM)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(*(Block(b, drop=drop_path_rate * b.index / b.count) for b in stage))
                for stage in stages
            )
        )
        self.conv_head = SameConv(stages[-1][-1].outputs, HEAD, 1)
        self.bn2 = _norm(HEAD)
        self.dropout = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head; 0 leaves none."""
        self.classifier = nn.Linear(HEAD, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, 1280, ceil(H / 32), ceil(W / 32))``."""
        x = F.relu6(self.bn1(self.conv_stem(x)))
        return F.relu6(self.bn2(self.conv_head(self.blocks(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        pooled = self.forward_features(x).mean(axis=[2, 3])
        return self.classifier(self.dropout(pooled))
