"""Networks of PaddleClas, an optional package: built any number of times, and frozen in units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paddle import nn
from paddle.utils import unique_name

from shared_core.checkpoints import weights_sha256
from shared_core.for_paddle.checkpoints import to_numpy
from shared_core.runs import UsageError


def _maker(name: str) -> Any:
    """What builds one of paddleclas' classifiers.

    Raises:
        ImportError: paddleclas is not installed; it has wheels for Python 3.10 and 3.11.
        ValueError: it has no such network.
    """
    try:
        import paddleclas
    except ImportError as error:
        raise ImportError(
            "networks of paddleclas need the package: pip install "
            "'visiondistill_gc[paddleclas]' in an environment of its own, Python 3.10 or 3.11"
        ) from error
    build = getattr(paddleclas, name, None)
    if not name[:1].isupper() or not callable(build):
        raise ValueError(f"paddleclas has no network {name!r}, expected for example ResNet50")
    return build


def build_paddleclas(
    name: str, *, num_classes: int, frozen: int = 0, freeze_bn: bool = True
) -> nn.Layer:
    """One of paddleclas' classifiers, ``ResNet50`` or ``PPLCNet_x1_0`` say, with random weights.

    Its MobileNetV2 gives its parameters fixed names, which Paddle refuses the second time unless
    names are generated in a scope of their own.

    Args:
        frozen: units of :func:`units_of` that do not learn.
        freeze_bn: keep the statistics of their batch norms, too.

    Raises:
        ImportError: paddleclas is not installed.
        ValueError: it has no such network, or one of fewer units.
    """
    build = _maker(name)
    with unique_name.guard():
        net = build(pretrained=False, class_num=num_classes)
    units = units_of(net)
    if not 0 <= frozen <= len(units):
        raise ValueError(f"frozen is {frozen}, expected 0 to {len(units)} units of {name}")
    for unit in units[:frozen]:
        for parameter in unit.parameters():
            parameter.stop_gradient = True
            parameter.trainable = False
        for layer in unit.sublayers(include_self=True) if freeze_bn else ():
            if hasattr(layer, "_use_global_stats"):
                layer._use_global_stats = True  # in training mode, too
    return net


def units_of(net: nn.Layer) -> list[nn.Layer]:
    """What is frozen one after the other: stem, blocks, last convolution; not the head.

    MobileNetV2 has the 19 units of paddle.vision's.
    """
    layers = net.sublayers()
    blocks = [layer for layer in layers if type(layer).__name__ == "InvertedResidualUnit"]
    if blocks:
        return [net.conv1, *blocks, net.conv9]

    def within(layer: nn.Layer) -> Iterator[nn.Layer]:
        for child in layer.children():
            if isinstance(child, nn.Sequential | nn.LayerList):
                yield from within(child)
            elif child.parameters():
                yield child

    return list(within(net))[:-1]


def paddleclas_weights(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """ImageNet weights as paddleclas downloads them, and facts of them for the record.

    Raises:
        UsageError: they cannot be had here; the line says what to do.
    """
    build = _maker(name)
    try:
        with unique_name.guard():
            net = build(pretrained=True)
    except (Exception, SystemExit) as error:  # fetching ends in errors of several libraries
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UsageError(
            f"no trained weights of paddleclas' {name} can be had here ({reason}): give its "
            ".pdparams file by --init FILE (the teacher's by --teacher-pretrained FILE), or say "
            "--init none"
        ) from error
    arrays = to_numpy(net.state_dict())
    facts = {"name": f"paddleclas {name}", "licence": "Apache-2.0", "trained_on": "ImageNet-1k"}
    return arrays, {**facts, "sha256": weights_sha256(arrays)}
