"""The teacher: ResNet50, or any other classifier of paddle.vision (or paddleclas) by name."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.utils import unique_name
from paddle.vision import models as vision

from visiondistill_gc.options import SOURCES

DEFAULT = "resnet50"


class MainOutput(nn.Layer):
    """A network that returns helper outputs as well (GoogLeNet): only the first counts."""

    def __init__(self, net: nn.Layer) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """The first of the outputs."""
        return self.net(images)[0]


def teacher_names() -> list[str]:
    """Names of paddle.vision's classifiers that take images of any size; LeNet takes digits."""
    return sorted(
        name
        for name in vision.__all__
        if name.islower() and callable(getattr(vision, name, None)) and name != "lenet"
    )


def build_teacher(
    name: str = DEFAULT, *, num_classes: int, source: str = "paddle.vision"
) -> nn.Layer:
    """A classifier with random weights; ``built_from`` of it holds what rebuilds it.

    Args:
        name: see :func:`teacher_names`; with ``paddleclas`` one of its classes, ``ResNet50``.
        num_classes: at least 2.
        source: ``paddle.vision`` or ``paddleclas``.

    Raises:
        ValueError: a name or source that is not there.
        ImportError: paddleclas is not installed.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected at least 2")
    if source == "paddleclas":
        from visiondistill_gc.models.paddleclas_models import build_paddleclas

        net = build_paddleclas(name, num_classes=num_classes)
    elif source == "paddle.vision":
        if name not in teacher_names():
            raise ValueError(
                f"teacher is {name!r}, expected one of paddle.vision: {', '.join(teacher_names())}"
            )
        with unique_name.guard():
            net = getattr(vision, name)(pretrained=False, num_classes=num_classes)
            if name == "googlenet":
                net = MainOutput(net)
    else:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    recipe: dict[str, Any] = {"kind": "teacher", "source": source, "name": name}
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
