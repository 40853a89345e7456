"""ResNet20 and ResNet50 with 1024 features, the smallest and the deepest of the choices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.recompute import run_block


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions of one width beside a shortcut (the usual one ends 4 x wider)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv3, self.bn3 = _conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Stages of residual blocks, the mean over the map, and a linear layer if the width needs it.

    Args:
        stem: from images to ``stem_width`` channels.
        stem_width: channels of the first block's input.
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks of each stage.
        widths: channels of each stage; every stage but the first halves the map.
        feature_dim: features; a linear layer makes them from the last width when they differ.

    Source: He et al. 2016, arXiv:1512.03385, sections 4.1 and 4.2.
    """

    smallest = 1

    def __init__(
        self,
        stem: nn.Module,
        *,
        stem_width: int,
        block: type[nn.Module],
        depths: Sequence[int],
        widths: Sequence[int],
        feature_dim: int,
    ) -> None:
        super().__init__()
        self.feature_dim, self.checkpointing = feature_dim, False
        self.stem = stem
        self.layers, before = nn.ModuleList(), stem_width
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = []
            for place in range(depth):
                stage.append(block(before, width, 2 if number and place == 0 else 1))
                before = width
            self.layers.append(nn.Sequential(*stage))
        same = before == feature_dim
        self.project = nn.Identity() if same else nn.Linear(before, feature_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to features ``(N, feature_dim)``."""
        x = self.stem(images)
        for stage in self.layers:
            for block in stage:
                x = run_block(block, x, again=self.checkpointing)
        return self.project(x.mean(dim=(2, 3)))


def resnet20(feature_dim: int = 1024, *, width: int = 16) -> ResNet:
    """The CIFAR ResNet20: three stages of ``width``, 2 and 4 times as many channels.

    Its 64 features are made ``feature_dim`` by a linear layer; with ``width=feature_dim // 4`` the
    convolutions themselves are that wide.
    """
    if width < 1:
        raise ValueError(f"width is {width}, expected at least 1")
    stem = nn.Sequential(_conv(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
    return ResNet(
        stem,
        stem_width=width,
        block=BasicBlock,
        depths=(3, 3, 3),
        widths=(width, 2 * width, 4 * width),
        feature_dim=feature_dim,
    )


def resnet50(feature_dim: int = 1024) -> ResNet:
    """ResNet50 whose bottlenecks keep their width: stages of 128, 256, 512, 1024 channels."""
    if feature_dim < 8 or feature_dim % 8:
        raise ValueError(f"feature_dim is {feature_dim}, expected a multiple of 8")
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    return ResNet(
        stem,
        stem_width=64,
        block=Bottleneck,
        depths=(3, 4, 6, 3),
        widths=[feature_dim // 8 * 2**stage for stage in range(4)],
        feature_dim=feature_dim,
    )
