"""The small student: a few convolutions, and the test that it is small beside its teacher."""

from __future__ import annotations

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
