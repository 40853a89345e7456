"""The teacher: ResNet-18 (or another of torchvision's), fit for 32 pixels, from weights or anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpkd.model.student import torchvision_net
from shared_core.for_torch.checkpoints import fit_into, load_foreign_weights

CIFAR_SIZE = 64  # images up to this side get the small stem


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


def build_teacher(
    name: str, *, num_classes: int, image_size: int, stem: str = "auto", **options: Any
) -> nn.Module:
    """A network of torchvision with random weights, its stem small where the images are.

    Args:
        image_size: side in pixels.
        stem: ``small``, ``standard``, or ``auto`` (small up to 64 pixels, for a ResNet).

    Raises:
        ValueError: unknown name or stem.
    """
    if stem not in ("auto", "small", "standard"):
        raise ValueError(f"stem {stem!r}: expected auto, small or standard")
    net = torchvision_net(name, num_classes=num_classes, **options)
    resnet = isinstance(getattr(net, "conv1", None), nn.Conv2d) and hasattr(net, "maxpool")
    if stem == "small" or (stem == "auto" and resnet and image_size <= CIFAR_SIZE):
        small_stem(net)
    return net


def load_pretrained(net: nn.Module, path: str | Path) -> list[str]:
    """Fill ``net`` from a weight file; a head of another size stays as it is, and is named.

    Every other weight must fit. The head of a file of the same class count is kept: a teacher with
    a random head has nothing to teach.

    Args:
        path: a state dict (``.pth``, read without executing anything) or safetensors.

    Returns:
        Names of the weights that were left out.

    Raises:
        ValueError, FileNotFoundError: see :func:`shared_core.for_torch.checkpoints.fit_into`.
    """
    weights = dict(load_foreign_weights(path))
    own = net.state_dict()
    head = head_name(net)
    left: list[str] = []
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in weights and name in own and weights[name].shape != own[name].shape:
            weights[name] = own[name]
            left.append(name)
    fit_into(net, weights, path=path)
    return left


def head_name(net: nn.Module) -> str:
    """Dotted name of the last linear layer.

    Raises:
        ValueError: there is none.
    """
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(net).__name__} has no linear layer, expected a classifier")
    return linear[-1]


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
