"""EfficientNet-lite for torch; its twin is :mod:`shared_core.for_paddle.efficientnet_lite`.

Names and numbers are those of timm's ``tf_efficientnet_lite*``, so that their files fit, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from shared_core.weights.efficientnet_lite import (
    BN_EPS,
    HEAD,
    STEM,
    BlockPlan,
    block_plan,
    same_padding,
)


class SameConv(nn.Conv2d):
    """Without bias, padded as TensorFlow: the output's side is ``ceil(side / stride)``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, 1, groups, False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, ceil(H / stride), ceil(W / stride))``."""
        if self.stride[0] > 1:
            kernel, stride = self.kernel_size[0], self.stride[0]
            top, bottom = same_padding(int(x.shape[2]), kernel=kernel, stride=stride)
            left, right = same_padding(int(x.shape[3]), kernel=kernel, stride=stride)
            x = F.pad(x, (left, right, top, bottom))
        return super().forward(x)


def drop_path(x: Tensor, rate: float, *, training: bool) -> Tensor:
    """Leave a block's branch out for a random share ``rate`` of the samples; the rest grows.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """
    if not training or rate == 0:
        return x
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


class Block(nn.Module):
    """Expand, convolve each channel, project; the input is added where shapes allow."""

    def __init__(self, plan: BlockPlan, *, drop: float) -> None:
        super().__init__()
        self.residual, self.expands, self.drop = plan.residual, plan.expansion > 1, drop
        hidden = plan.hidden
        depthwise = SameConv(hidden, hidden, plan.kernel, stride=plan.stride, groups=hidden)
        if self.expands:
            self.conv_pw = SameConv(plan.inputs, hidden, 1)
            self.bn1 = nn.BatchNorm2d(hidden, eps=BN_EPS)
            self.conv_dw = depthwise
            self.bn2 = nn.BatchNorm2d(hidden, eps=BN_EPS)
            self.conv_pwl = SameConv(hidden, plan.outputs, 1)
            self.bn3 = nn.BatchNorm2d(plan.outputs, eps=BN_EPS)
        else:
            self.conv_dw = depthwise
            self.bn1 = nn.BatchNorm2d(hidden, eps=BN_EPS)
            self.conv_pw = SameConv(hidden, plan.outputs, 1)
            self.bn2 = nn.BatchNorm2d(plan.outputs, eps=BN_EPS)

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


class EfficientNetLite(nn.Module):
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
        self.bn1 = nn.BatchNorm2d(STEM, eps=BN_EPS)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(*(Block(b, drop=drop_path_rate * b.index / b.count) for b in stage))
                for stage in stages
            )
        )
        self.conv_head = SameConv(stages[-1][-1].outputs, HEAD, 1)
        self.bn2 = nn.BatchNorm2d(HEAD, eps=BN_EPS)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def reset_classifier(self, num_classes: int) -> None:
        """A new head; 0 leaves none."""
        self.classifier = nn.Linear(HEAD, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, 1280, ceil(H / 32), ceil(W / 32))``."""
        x = F.relu6(self.bn1(self.conv_stem(x)))
        return F.relu6(self.bn2(self.conv_head(self.blocks(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        pooled = self.forward_features(x).mean(dim=(2, 3))
        out: Tensor = self.classifier(self.dropout(pooled))
        return out
