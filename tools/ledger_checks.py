"""Claims that need no data, recomputed: parameters and multiply-accumulates of published nets.

Networks are built on PyTorch's ``meta`` device, without initialising weights: seconds in all.
"""

from __future__ import annotations

from typing import Any

# Calling one of these builds a network; torch and torchvision load only then.


def gfnet_parameters(
    arch: str, img_size: int = 224, num_classes: int = 1000, patch_size: int | None = None
) -> int:
    """Parameters of a GFNet."""
    from shared_core.for_torch.cost import count_params

    return count_params(_gfnet(arch, img_size, num_classes, patch_size))


def gfnet_giga_macs(arch: str, img_size: int = 224, num_classes: int = 1000) -> float:
    """MACs of one image in units of 1e9, FFT and LayerNorm by the published convention."""
    import torch

    from shared_core.for_torch.cost import layer_costs
    from shared_core.metrics.cost import total_macs

    # Its filter asks for autocast, which "meta" does not know: real memory, arbitrary values.
    model = _gfnet(arch, img_size, num_classes, None).to_empty(device="cpu")
    images = torch.zeros(1, 3, img_size, img_size)
    return total_macs(layer_costs(model, images), elementwise=True) / 1e9


def landmark_parameters(name: str) -> int:
    """Parameters of a landmark network without its head, as published: 1,024 features."""
    import torch

    from landmark_distill.model import build_model
    from shared_core.for_torch.cost import count_params

    with torch.device("meta"):
        model = build_model(name)
    head = 0 if model.head is None else count_params(model.head)
    return count_params(model) - head


def zoo_mega_parameters(name: str, num_classes: int = 6) -> float:
    """Parameters of a torchvision net in units of 1e6."""
    from shared_core.for_torch.cost import count_params

    return count_params(_zoo(name, num_classes)) / 1e6


def zoo_mega_multiply_adds(name: str, num_classes: int = 6, img_size: int = 224) -> float:
    """The zoo table's own count for one image, in units of 1e6.

    Convolutions and linear layers count a bias as one more input; BatchNorm and ReLU count
    an operation an element, pooling its window; everything else counts nothing. This is
    the table's convention, not ``shared_core.metrics.cost``'s.
    """
    import math

    import torch
    from torch import nn

    model = _zoo(name, num_classes)
    total = 0

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * (
                math.prod(module.weight.shape[1:]) + (module.bias is not None)
            )
        elif isinstance(module, nn.Linear):
            total += output.numel() * (module.in_features + (module.bias is not None))
        elif isinstance(module, nn.BatchNorm2d) or type(module) is nn.ReLU:
            total += inputs[0].numel()
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            size = module.kernel_size
            window = size * size if isinstance(size, int) else math.prod(size)
            total += output.numel() * window

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        with torch.no_grad():
            model(torch.empty(1, 3, img_size, img_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return total / 1e6


def _gfnet(arch: str, img_size: int, num_classes: int, patch_size: int | None) -> Any:
    import torch

    from gfnet_dynn.models.build import build_gfnet

    with torch.device("meta"):
        return build_gfnet(
            arch, img_size=img_size, num_classes=num_classes, patch_size=patch_size, filter="fft"
        )


def _zoo(name: str, num_classes: int) -> Any:
    import torch
    import torchvision

    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=num_classes).eval()
