"""The student: a small convolutional network, or any of torchvision's by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shared_core.for_torch.cost import count_params

MAX_SHARE = 0.1  # of the teacher's parameters


class SimpleCNN(nn.Module):
    """Blocks of 3 x 3 convolution, batch norm, ReLU and 2 x 2 pooling; the mean; one linear layer.

    The mean over the positions takes the place of a flattened map, whose first linear layer would
    hold more parameters at 224 pixels than a whole ResNet-18. Any image size that the poolings
    leave a pixel of works.

    Args:
        num_classes: classes, at least 2.
        widths: channels of each block.

    Shapes: images ``(N, 3, H, W)`` with ``H, W >= 2 ** len(widths)``, logits ``(N, num_classes)``.
    """

    def __init__(self, num_classes: int, *, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        if num_classes < 2 or not widths or min(widths) < 1:
            raise ValueError(
                f"{num_classes} classes and widths {widths}: expected two or more classes and "
                "positive widths"
            )
        self.widths = tuple(widths)
        blocks: list[nn.Module] = []
        before = 3
        for width in widths:
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2),
                )
            )
            before = width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


def build_student(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """``simple_cnn`` (``widths=...``), or a network that torchvision lists, with random weights.

    Raises:
        ValueError: no such network; the line names near ones.
    """
    if name == "simple_cnn":
        return SimpleCNN(num_classes, **options)
    return torchvision_net(name, num_classes=num_classes, **options)


def torchvision_net(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """A classification network of torchvision by name, with random weights.

    Raises:
        ValueError: no such network; the line names near ones.
    """
    from difflib import get_close_matches

    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = get_close_matches(name, [*known, "simple_cnn"], n=3)
        raise ValueError(
            f"unknown network {name!r}: expected simple_cnn or one of torchvision's"
            + (f", perhaps {' or '.join(near)}" if near else "")
        )
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def check_small_enough(student: nn.Module, teacher: nn.Module, *, share: float = MAX_SHARE) -> None:
    """Refuse a student that is not small.

    Raises:
        ValueError: it has more than ``share`` of the teacher's parameters.
    """
    small, large = count_params(student), count_params(teacher)
    if small > share * large:
        raise ValueError(
            f"the student has {small:,} parameters, {small / large:.1%} of the teacher's "
            f"{large:,}: expected at most {share:.0%}"
        )
