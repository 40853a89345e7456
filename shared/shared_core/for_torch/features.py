"""Features of a trained network: what lies before its head, for probes, floors and galleries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_core.for_torch.data import Normalizer
from shared_core.for_torch.networks import Network, head_names


def head_inputs(model: nn.Module, images: Tensor, *, num_classes: int) -> Tensor:
    """What a network's head sees of normalised images: ``(N, D)``, no gradients.

    Args:
        num_classes: outputs of the head.
    """
    (head,) = head_names(model, num_classes)[:1]
    seen: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach())
    )
    try:
        with torch.inference_mode():
            model(images)
    finally:
        hook.remove()
    return seen[0].flatten(1)


def feature_function(
    network: Network, *, num_classes: int, device: torch.device | str = "cpu"
) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """uint8 views ``(N, H, W, 3)`` to float32 features ``(N, D)``; the network is in eval mode.

    Args:
        num_classes: outputs of the network's head.
    """
    layout = torch.channels_last  # convolutions of few channels are faster in it
    model = network.model.to(device).eval().to(memory_format=layout)
    normalize = Normalizer(tuple(network.mean), tuple(network.std), device=torch.device(device))

    def run(views: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = normalize(views).contiguous(memory_format=layout)
        found = head_inputs(model, images, num_classes=num_classes)
        return np.asarray(found.float().cpu().numpy())

    return run
