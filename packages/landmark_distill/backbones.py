"""Networks of the core, torchvision and timm as encoders: their body, then a layer for features."""

from __future__ import annotations

from torch import Tensor, nn

from landmark_distill.config import BACKBONES, IMAGENET_MEAN, IMAGENET_STD
from shared_core.for_torch.networks import (
    Network,
    find_network,
    head_names,
    make_network,
)
from shared_core.weights.catalogue import entry

CLASSES = 1000  # of the head that is taken off: ImageNet's, so that trained weights fit whole


class LibraryEncoder(nn.Module):
    """Normalised images ``(N, 3, H, W)`` to features ``(N, feature_dim)``.

    ``body`` is a library's network up to its head; ``project``, a linear layer, makes the features.

    Args:
        network: with a head of ``CLASSES`` outputs, which is dropped.
        feature_dim: numbers of a feature.
    """

    smallest = 32  # pixels: these networks halve an image five times

    def __init__(self, network: Network, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim, self.checkpointing = feature_dim, False
        self.body, width = without_head(network.model)
        self.project = nn.Linear(width, feature_dim)

    def seen(self, images: Tensor) -> Tensor:
        """What the body makes of the images, ``(N, D)``: what the new layer takes in."""
        seen = self.body(images)
        if isinstance(seen, tuple):  # a network with a second head, for distillation
            seen = sum(seen) / len(seen)
        return seen.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.seen(images))


def without_head(model: nn.Module) -> tuple[nn.Module, int]:
    """A network of ``CLASSES`` outputs without the layers that make them, and what they took in."""
    width = 0
    for name in head_names(model, CLASSES):
        layer = model.get_submodule(name)
        width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
    return model, width


def library_encoder(
    name: str,
    *,
    feature_dim: int,
    image_size: int | tuple[int, int],
    drop_rate: float = 0.0,
    drop_path: float = 0.0,
) -> LibraryEncoder:
    """``efficientnet_lite0``, ``torchvision/NAME`` or ``timm/NAME``, with random weights.

    Raises:
        ValueError: no such network, or a size or rate that it has no place for.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    network = make_network(
        name,
        num_classes=CLASSES,
        image_size=sides,
        drop_rate=drop_rate,
        drop_path_rate=drop_path,
    )
    return LibraryEncoder(network, feature_dim)


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, RGB in [0, 1], that a network is used to; of our own, ImageNet's.

    Raises:
        ValueError: no such network.
    """
    if name in BACKBONES:
        return IMAGENET_MEAN, IMAGENET_STD
    found = find_network(name)
    known = entry(found.name) if found.library == "core" else None
    if known is not None:
        return known.mean, known.std
    if found.library == "timm":
        import timm

        config = timm.get_pretrained_cfg(found.name)
        if config is not None:
            return tuple(config.mean), tuple(config.std)
    return IMAGENET_MEAN, IMAGENET_STD
