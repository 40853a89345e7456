"""The teacher: ResNet50, or any other classifier of paddle.vision, the core or paddleclas."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.utils import unique_name
from paddle.vision import models as vision

from shared_core.for_paddle.data import IMAGENET_MEAN, IMAGENET_STD
from shared_core.weights.catalogue import ALIASES, entry, names
from visiondistill_gc.models.lite_model import Lite
from visiondistill_gc.options import MOBILENET, SOURCES

DEFAULT = "resnet50"


class MainOutput(nn.Layer):
    """A network that returns helper outputs as well (GoogLeNet): only the first counts."""

    def __init__(self, net: nn.Layer) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """The first of the outputs."""
        return self.net(images)[0]


class Renormalised(nn.Layer):
    """A network that is given images normalised for another: ``from_normal`` to ``net.normal``."""

    def __init__(self, net: nn.Layer, from_normal: tuple[Any, Any]) -> None:
        super().__init__()
        self.net = net
        (mean, std), (own_mean, own_std) = (
            [paddle.to_tensor(part, "float32").reshape([1, 3, 1, 1]) for part in normal]
            for normal in (from_normal, net.normal)
        )
        self.register_buffer("factor", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.net(images * self.factor + self.shift)


def normal_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, RGB in [0, 1], that a network's trained weights expect."""
    known = entry(name)
    return (known.mean, known.std) if known else (IMAGENET_MEAN, IMAGENET_STD)


def teacher_names() -> list[str]:
    """The core's networks and paddle.vision's that take images of any size; LeNet takes digits."""
    return [*names(), *ALIASES, *vision_names()]


def vision_names() -> list[str]:
    """Names of paddle.vision's classifiers."""
    return sorted(
        name
        for name in vision.__all__
        if name.islower() and callable(getattr(vision, name, None)) and name != "lenet"
    )


def build_teacher(
    name: str = DEFAULT, *, num_classes: int, source: str = "paddle.vision", **own: Any
) -> nn.Layer:
    """A classifier with random weights; ``built_from`` of it holds what rebuilds it.

    Args:
        name: see :func:`teacher_names`; with ``paddleclas`` one of its classes, ``ResNet50``.
        num_classes: at least 2.
        source: ``paddle.vision`` or ``paddleclas``.
        own: ``frozen``, ``freeze_bn`` of an EfficientNet-lite and of paddleclas, ``dropout`` of
            the first; other networks have no such settings, and these are passed over.

    Raises:
        ValueError: a name or source that is not there.
        ImportError: paddleclas is not installed.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected at least 2")
    if source == "paddleclas":
        from visiondistill_gc.models.paddleclas_models import build_paddleclas

        name = "MobileNetV2" if name == MOBILENET else name
        own = {key: value for key, value in own.items() if key != "dropout"}
        net = build_paddleclas(name, num_classes=num_classes, **own)
    elif source == "paddle.vision":
        if name not in teacher_names():
            raise ValueError(f"network {name!r}, expected one of {', '.join(teacher_names())}")
        name = ALIASES.get(name, name)
        own = own if entry(name) else {}
        with unique_name.guard():
            if entry(name):
                net = Lite(name, num_classes=num_classes, **own)
            else:
                net = getattr(vision, name)(pretrained=False, num_classes=num_classes)
            if name == "googlenet":
                net = MainOutput(net)
    else:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    net.normal = normal_of(name)
    recipe: dict[str, Any] = {"kind": "teacher", "source": source, "name": name, **own}
    net.built_from = {**recipe, "num_classes": num_classes}
    return net


def freeze(net: nn.Layer) -> nn.Layer:
    """The network as a teacher: no parameter learns, batch norm and dropout as in evaluation."""
    net.eval()
    for parameter in net.parameters():
        parameter.stop_gradient = True
    return net


@paddle.no_grad()
def teach(net: nn.Layer, images: Tensor) -> Tensor:
    """Logits of a frozen teacher, float32 ``(N, C)``."""
    return net(images)
