"""Class activation maps: CAM, Grad-CAM and Grad-CAM++ for any network of the zoo.

With ``A`` the feature maps ``(K, h, w)`` of a layer, ``S_c`` a class' logit, ``g = dS_c/dA``::

    CAM         relu(sum_k w_ck A_k)                          w: the weights of the head
    Grad-CAM    relu(sum_k a_k A_k),   a_k = mean_ij g_kij
    Grad-CAM++  relu(sum_k a_k A_k),   a_k = sum_ij q_kij relu(g_kij),
                q_kij = g^2 / (2 g^2 + (sum_ab A_kab) g^3)    (0 where the denominator is 0)

For a network of global average pooling and one linear layer CAM is ``h * w`` times Grad-CAM.
Grad-CAM++ is derived for ``exp(S_c)``; its factor ``exp(S_c)`` scales a whole map and is left out.

Source: Zhou et al. 2016, arXiv:1512.04150, equation 2; Selvaraju et al. 2017, arXiv:1610.02391,
equations 1 and 2; Chattopadhay et al. 2018, arXiv:1710.11063, equations 10 and 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from shared_core.for_torch.networks import head_names
from torch_cls_zoo.explain.cam_layers import Layout, layout_of, module_at, to_maps

METHODS = ("cam", "grad-cam", "grad-cam++")


def class_maps(
    model: nn.Module,
    images: Tensor,
    classes: Sequence[Sequence[int]],
    *,
    layer: str,
    methods: Sequence[str] = METHODS,
) -> tuple[dict[str, Tensor], Tensor]:
    """Maps of chosen classes for a batch.

    Args:
        model: gives logits ``(N, C)``; runs in eval mode and is as before afterwards.
        images: normalised, ``(N, 3, H, W)``.
        classes: for each image the classes to explain, as many (M) for each.
        layer: name of a module; see :func:`torch_cls_zoo.explain.cam_layers.default_layer`.
        methods: out of ``cam``, ``grad-cam``, ``grad-cam++``.

    Returns:
        By method the maps float ``(N, M, h, w)``, 0 or above and in the units of the formulas; and
        the logits ``(N, C)``.

    Raises:
        ValueError: unknown method or layer, a layer without a map, or CAM for a network that is
            not global average pooling and one linear layer after ``layer``.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"--visual_method {unknown[0]!r}, expected some of {', '.join(METHODS)}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            output, logits = _forward(model, images, layer)
            layout = layout_of(output, images.shape[-2:], head_width(model, logits.shape[1]))
            maps = to_maps(output.detach(), layout)
            wanted = torch.as_tensor(classes, device=logits.device)  # (N, M)
            result: dict[str, list[Tensor]] = {name: [] for name in methods}
            for column in range(wanted.shape[1]):
                chosen = wanted[:, column]
                gradients = None
                if any(name != "cam" for name in methods):
                    score = logits.gather(1, chosen[:, None]).sum()
                    (raw,) = torch.autograd.grad(score, output, retain_graph=True)
                    gradients = to_maps(raw, layout)
                for name in methods:
                    weights = _weights(name, model, maps, gradients, logits, chosen, layer)
                    result[name].append(F.relu((weights[..., None, None] * maps).sum(dim=1)))
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: torch.stack(found, dim=1) for name, found in result.items()}, logits.detach()


def grad_cam_weights(gradients: Tensor) -> Tensor:
    """``(N, K, h, w)`` to ``(N, K)``: mean over the places."""
    return gradients.mean(dim=(2, 3))


def grad_cam_pp_weights(maps: Tensor, gradients: Tensor) -> Tensor:
    """``(N, K)`` from feature maps and gradients ``(N, K, h, w)``; see the module."""
    square = gradients.square()
    below = 2 * square + maps.sum(dim=(2, 3), keepdim=True) * square * gradients
    share = torch.where(below != 0, square / torch.where(below != 0, below, 1.0), 0.0)
    return (share * F.relu(gradients)).sum(dim=(2, 3))


def head_width(model: nn.Module, num_classes: int) -> int:
    """Inputs of the head: channels of the features that it reads."""
    head = dict(model.named_modules())[head_names(model, num_classes)[0]]
    return int(head.weight.shape[1])


def cam_weights(model: nn.Module, maps: Tensor, logits: Tensor, layer: str) -> Tensor:
    """The head's weights ``(C, K)``, after a check that they explain the logits.

    Raises:
        ValueError: the logits are not the head of the maps' mean.
    """
    heads = head_names(model, logits.shape[1])
    head: Any = dict(model.named_modules())[heads[0]]
    weight = head.weight.detach().flatten(1)
    fits = len(heads) == 1 and weight.shape[1] == maps.shape[1]
    if fits:
        again = F.linear(maps.mean(dim=(2, 3)), weight, head.bias)
        size = logits.abs().max().clamp_min(1e-6)
        fits = bool((again - logits).abs().max() <= 1e-3 * size)
    if not fits:
        raise ValueError(
            f"--visual_method cam: {type(model).__name__} is not global average pooling and one "
            f"linear layer after {layer}, expected such a network; use grad-cam"
        )
    return weight


def normalized(maps: Tensor) -> Tensor:
    """Each map divided by its largest value: ``(..., h, w)`` in [0, 1]; a map of 0 stays 0."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-30)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to ``size``: ``(N, M, h, w)`` to ``(N, M, H, W)``."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _weights(
    name: str, model: nn.Module, maps: Tensor, gradients: Tensor | None, logits: Tensor,
    chosen: Tensor, layer: str,
) -> Tensor:  # fmt: skip
    if name == "cam" or gradients is None:
        return cam_weights(model, maps, logits.detach(), layer)[chosen]
    if name == "grad-cam":
        return grad_cam_weights(gradients)
    return grad_cam_pp_weights(maps, gradients)


def _forward(model: nn.Module, images: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The layer's output as a leaf of the graph, and the logits that were computed from it."""
    from torchvision.models import DenseNet

    if isinstance(model, DenseNet) and layer == "features":
        return _densenet(model, images)
    kept: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"--visual_layer {layer}: gives {type(output).__name__}, expected one tensor"
            )
        kept.append(output.detach().clone().requires_grad_())
        return kept[-1].clone()  # what comes after may write into its input

    handle = module_at(model, layer).register_forward_hook(hook)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if not kept or not logits.requires_grad:
        raise ValueError(f"--visual_layer {layer}: the logits do not depend on it")
    return kept[-1], logits


def _densenet(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last maps of torchvision's DenseNet: it rectifies them by a call that no module shows."""
    net: Any = model
    with torch.no_grad():
        maps = F.relu(net.features(images))
    maps.requires_grad_()
    return maps, net.classifier(maps.mean(dim=(2, 3)))


__all__ = [
    "METHODS",
    "Layout",
    "cam_weights",
    "class_maps",
    "enlarge",
    "grad_cam_pp_weights",
    "grad_cam_weights",
    "normalized",
]
