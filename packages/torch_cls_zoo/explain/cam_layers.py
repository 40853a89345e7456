"""Which layer to explain, and how its output becomes maps ``(N, K, h, w)``.

The default is found by running one image: the last layer before the head whose output is a map (or
a grid of tokens), and whose places all matter. In a transformer that reads its class token alone,
the patches of the last block no longer reach the logits; the layer is then the one that feeds the
last attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.for_torch.networks import head_names

MOST_PREFIX = 5  # class, distillation and register tokens before the patches


@dataclass(frozen=True)
class Layout:
    """How the places of an output are laid out.

    Attributes:
        kind: ``nchw``, ``nhwc`` or ``tokens`` (``(N, prefix + rows * columns, K)``).
        grid: rows and columns.
        prefix: tokens before the patches.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0


def layout_of(output: Tensor, image_size: Any, width: int) -> Layout:
    """Tell the layout of ``output`` by its shape.

    Args:
        output: ``(N, K, h, w)``, ``(N, h, w, K)`` or ``(N, T, K)``.
        image_size: height and width of the image, pixels.
        width: channels that the head reads, which tells channels from places.

    Raises:
        ValueError: no map can be read from this shape.
    """
    height, breadth = int(image_size[0]), int(image_size[1])
    shape = tuple(output.shape)
    if output.ndim == 4:
        first, last = _is_grid(shape[2:], height, breadth), _is_grid(shape[1:3], height, breadth)
        last_is_channel = shape[3] == width and shape[1] != width
        if last and (last_is_channel or not first):
            return Layout("nhwc", (shape[1], shape[2]))
        if first:
            return Layout("nchw", (shape[2], shape[3]))
    if output.ndim == 3:
        for prefix in range(MOST_PREFIX + 1):
            tokens = shape[1] - prefix
            if tokens < 1:
                break
            rows = max(1, round(math.sqrt(tokens * height / breadth)))
            if tokens % rows == 0 and _is_grid((rows, tokens // rows), height, breadth, slack=0.5):
                return Layout("tokens", (rows, tokens // rows), prefix)
    raise ValueError(
        f"--visual_layer gives {shape}, expected maps (N, K, h, w) or tokens (N, T, K)"
    )


def _is_grid(grid: tuple[int, ...], height: int, width: int, *, slack: float = 1.01) -> bool:
    """Whether rows and columns look like the image in steps of one size, up to ``slack`` places."""
    rows, columns = grid
    if rows > height or columns > width:
        return False
    step = max(height / rows, width / columns)
    return abs(rows - height / step) < slack and abs(columns - width / step) < slack


def to_maps(output: Tensor, layout: Layout) -> Tensor:
    """``output`` (or its gradient) as ``(N, K, h, w)``."""
    if layout.kind == "nchw":
        return output
    if layout.kind == "nhwc":
        return output.permute(0, 3, 1, 2)
    rows, columns = layout.grid
    patches = output[:, layout.prefix :]  # (N, rows * columns, K)
    return patches.transpose(1, 2).reshape(len(output), -1, rows, columns)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module called ``name``.

    Raises:
        ValueError: there is none; close names are offered.
    """
    modules = dict(model.named_modules())
    if name not in modules or not name:
        import difflib

        close = difflib.get_close_matches(name, list(modules), n=4)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"--visual_layer {name!r}, expected a module of the network{hint}")
    return modules[name]


def default_layer(model: nn.Module, image: Tensor, num_classes: int) -> str:
    """Name of the layer that is explained when the user names none; see the module.

    Args:
        model: gives logits ``(1, num_classes)``; as before afterwards.
        image: ``(1, 3, H, W)``, normalised.
        num_classes: outputs of the head.

    Raises:
        ValueError: no layer gives a map that the logits depend on.
    """
    modules = dict(model.named_modules())
    heads = head_names(model, num_classes)
    width = int(modules[heads[0]].weight.shape[1])  # type: ignore[arg-type]
    seen: list[tuple[str, Tensor]] = []
    features: list[Tensor] = []  # what the heads read

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in heads:
                features.append(inputs[0])
            pooled = "Pool" in type(module).__name__
            if not features and not pooled and isinstance(output, Tensor) and output.ndim in (3, 4):
                seen.append((name, output))

        return hook

    modes = {module: module.training for module in modules.values()}
    handles = [
        module.register_forward_hook(watch(name)) for name, module in modules.items() if name
    ]
    model.eval()
    try:
        with torch.enable_grad():
            model(image.detach().clone().requires_grad_())
            # Not the logits: a head may start at 0, and then nothing would seem to matter.
            score = sum(feature.square().sum() for feature in features)
            gradients = (
                torch.autograd.grad(score, [output for _name, output in seen], allow_unused=True)
                if seen and isinstance(score, Tensor)
                else ()
            )
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    usable: list[tuple[str, int]] = []  # name and channels, in order of the forward
    for (name, output), gradient in zip(seen, gradients, strict=True):
        try:
            layout = layout_of(output, image.shape[-2:], width)
        except ValueError:
            continue
        if gradient is None or not bool((to_maps(gradient, layout) != 0).any()):
            continue
        if math.prod(layout.grid) > 1:
            usable.append((name, to_maps(output, layout).shape[1]))
    if not usable:
        raise ValueError(
            f"{type(model).__name__} gives no map of more than one place for this image size, "
            "expected a larger --image_size"
        )
    wide = [name for name, channels in usable if channels == width]
    return wide[-1] if wide else usable[-1][0]
