"""Features of a trained network: what lies before its head, for probes and floors.

The twin of :mod:`shared_core.for_torch.features`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from shared_core.for_paddle.data import Normalizer
from shared_core.metrics.probe import LinearProbe


def head_name(net: nn.Layer, num_classes: int) -> str:
    """The name of the last linear layer, which gives the ``num_classes`` logits.

    Raises:
        ValueError: there is no such layer.
    """
    for name, layer in reversed(list(net.named_sublayers())):
        if isinstance(layer, nn.Linear) and layer.weight.shape[1] == num_classes:
            return str(name)
    raise ValueError(f"{type(net).__name__} has no linear layer with {num_classes} outputs")


def _at(net: nn.Layer, name: str) -> tuple[nn.Layer, str]:
    """The layer that holds the one called ``name``, and what it calls it."""
    *above, last = name.split(".")
    for part in above:
        net = net._sub_layers[part]
    return net, last


@contextmanager
def headless(net: nn.Layer, num_classes: int) -> Iterator[nn.Layer]:
    """``net`` in eval mode giving what its head sees, ``(N, D)``; as it was after the ``with``.

    Raises:
        ValueError: a network without a linear head.
    """
    holder, name = _at(net, head_name(net, num_classes))
    head, training = holder._sub_layers[name], net.training
    holder._sub_layers[name] = nn.Identity()
    net.eval()
    try:
        yield net
    finally:
        holder._sub_layers[name] = head
        if training:
            net.train()


@paddle.no_grad()
def head_inputs(net: nn.Layer, images: Tensor, *, num_classes: int) -> Tensor:
    """What the head sees of normalised images: ``(N, D)``, no gradients."""
    with headless(net, num_classes) as body:
        return body(images).flatten(1)


def feature_function(
    net: nn.Layer, *, num_classes: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """uint8 views ``(N, H, W, 3)`` to float32 features ``(N, D)``.

    Args:
        num_classes: outputs of the network's head.
        mean, std: of the normalisation, RGB in [0, 1].
    """
    normalize = Normalizer(mean, std)

    def run(views: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = head_inputs(net, normalize(views), num_classes=num_classes)
        return np.asarray(found.astype("float32").numpy())

    return run


def start_head(net: nn.Layer, probe: LinearProbe) -> None:
    """Put a probe's weights into the head.

    Raises:
        ValueError: the probe looks at features of another width, or has other classes.
    """
    classes, width = probe.weight.shape
    holder, name = _at(net, head_name(net, classes))
    head = holder._sub_layers[name]
    if list(head.weight.shape) != [width, classes]:
        raise ValueError(f"a probe of {width} features for a head of {head.weight.shape[0]}")
    head.weight.set_value(np.ascontiguousarray(probe.weight.T))
    head.bias.set_value(probe.bias)
