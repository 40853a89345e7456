"""What a teacher needs: a stem that is fit for small images, and to know more than guessing."""

from __future__ import annotations

from torch import Tensor, nn


def small_stem(net: nn.Module) -> nn.Module:
    """ResNet for small images: a 3 x 3 first convolution of stride 1 and no first pooling.

    The 7 x 7 stem of stride 4 leaves one pixel of a 32-pixel image to the last stage.

    Raises:
        ValueError: not a ResNet of torchvision.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2.
    """
    stem = getattr(net, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not hasattr(net, "maxpool"):
        raise ValueError(f"{type(net).__name__} has no ResNet stem to make small")
    net.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def check_teaches(accuracy: float, class_shares: Tensor | list[float]) -> None:
    """Refuse a teacher that knows nothing.

    Args:
        accuracy: on validation images, in ``[0, 1]``.
        class_shares: share of each class among these images; the largest is what guessing reaches.

    Raises:
        ValueError: the accuracy is not above it.
    """
    chance = float(max(class_shares))
    if not accuracy > chance:
        raise ValueError(
            f"the teacher's validation accuracy is {accuracy:.4f}, expected more than {chance:.4f} "
            "(always saying the most frequent class): train it longer, or load its weights"
        )
