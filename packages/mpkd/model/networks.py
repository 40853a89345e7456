"""A network by its name, mpkd's own small one or any that the core knows; how it sees an image.

The loaders give images of one side, normalised as most networks here expect. A network whose
weights were trained with another mean, or that is to see more pixels than its images have, carries
a :class:`Sight`; the loader that is made for it, and whoever shows it another network's images,
goes by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkd.model.student import SimpleCNN
from mpkd.model.teacher import small_stem
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD
from shared_core.for_torch.networks import make_network

OWN = "simple_cnn"
SMALL_STEM = 64  # pixels: up to this side a ResNet that starts from nothing gets the small stem


@dataclass(frozen=True)
class Sight:
    """What a network sees.

    Attributes:
        mean, std: of RGB in [0, 1], that its images are normalised with.
        side: pixels that images are enlarged to; 0 = as the loader's view gives them.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    side: int = 0

    def enlarged(self, images: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` at ``side``, bicubic."""
        if self.side in (0, images.shape[-1]):
            return images
        size = (self.side, self.side)
        return F.interpolate(images, size, mode="bicubic", align_corners=False)

    def of(self, images: Tensor, seen: Sight) -> Tensor:
        """The images that another network sees as ``seen``, as this one sees them.

        Raises:
            ValueError: the other one sees more pixels, which cannot be taken back.
        """
        if seen.side and seen.side != self.side:
            raise ValueError(f"images of {seen.side} pixels, expected {self.side or 'plain ones'}")
        if (self.mean, self.std) != (seen.mean, seen.std):
            ours, theirs = torch.tensor([self.std, self.mean]), torch.tensor([seen.std, seen.mean])
            scale, shift = theirs[0] / ours[0], (theirs[1] - ours[1]) / ours[0]
            shape = (1, 3, 1, 1)
            images = images * scale.to(images.device).view(shape)
            images = images + shift.to(images.device).view(shape)
        return self.enlarged(images)


PLAIN = Sight()


def sight_of(net: nn.Module) -> Sight:
    """How a network sees; as most do, where nothing is said."""
    found = getattr(net, "sight", PLAIN)
    return found if isinstance(found, Sight) else PLAIN


def build_net(about: Mapping[str, Any], *, num_classes: int) -> nn.Module:
    """A network with random weights.

    Args:
        about: ``name``, ``image_size`` (side in pixels that it sees), ``options``, ``stem``
            (``small``, ``standard``, or ``auto``: small up to 64 pixels, for a ResNet), and
            ``side`` of its sight.

    Raises:
        ValueError: unknown name or stem.
    """
    options = {
        k: tuple(v) if isinstance(v, list) else v for k, v in about.get("options", {}).items()
    }
    stem, size, side = about["stem"], about["image_size"], about.get("side", 0)
    if stem not in ("auto", "small", "standard"):
        raise ValueError(f"stem {stem!r}: expected auto, small or standard")
    if about["name"] == OWN:
        net: nn.Module = SimpleCNN(num_classes, **options)
        net.sight = Sight(side=side)  # type: ignore[assignment]
        return net
    made = make_network(about["name"], num_classes=num_classes, image_size=(size, size))
    net = made.model
    net.sight = Sight(tuple(made.mean), tuple(made.std), side)  # type: ignore[assignment]
    resnet = isinstance(getattr(net, "conv1", None), nn.Conv2d) and hasattr(net, "maxpool")
    if stem == "small" or (stem == "auto" and resnet and size <= SMALL_STEM):
        small_stem(net)
    return net
