"""What a network is made of: each layer's output shape, parameters and MACs, and the totals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shared_core.for_torch.cost import count_params, layer_costs


@dataclass(frozen=True)
class Layer:
    """One module that has parameters of its own or multiplies."""

    name: str
    kind: str  # its class
    shape: tuple[int, ...]  # of its output without the batch; empty when that is no single tensor
    params: int
    macs: int  # of one image


@dataclass(frozen=True)
class Summary:
    """A network's layers in the order of its modules, for one image of ``image_size`` pixels."""

    layers: tuple[Layer, ...]
    image_size: tuple[int, int]
    params: int
    trainable: int
    macs: int


def summarize(model: nn.Module, image_size: tuple[int, int]) -> Summary:
    """Measure ``model`` with one black image ``(1, 3, H, W)``; it is as before afterwards.

    Raises:
        ValueError: the network cannot take images of this size.
    """
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    shapes: dict[str, tuple[int, ...]] = {}
    kinds = {name or "(model)": type(module).__name__ for name, module in model.named_modules()}
    handles: list[RemovableHandle] = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(remember(name or "(model)")))
        costs = layer_costs(model, torch.zeros(1, 3, *image_size, device=place))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(
            f"--image_size {image_size[0]} {image_size[1]}: {type(model).__name__} cannot take it "
            f"({reason})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    layers = tuple(
        Layer(c.name, kinds[c.name], shapes.get(c.name, ()), c.params, c.macs) for c in costs
    )
    return Summary(
        layers=layers,
        image_size=image_size,
        params=count_params(model),
        trainable=count_params(model, trainable=True),
        macs=sum(layer.macs for layer in layers),
    )


def format_summary(summary: Summary, *, layers: bool = True) -> str:
    """A table of plain text; ``layers=False`` gives the totals only."""
    rows = [("layer", "kind", "output", "params", "MACs")]
    for layer in summary.layers if layers else ():
        shape = " x ".join(str(side) for side in layer.shape) or "-"
        rows.append((layer.name, layer.kind, shape, f"{layer.params:,}", f"{layer.macs:,}"))
    lines = []
    if layers:
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            text = [row[i].ljust(widths[i]) if i < 3 else row[i].rjust(widths[i]) for i in range(5)]
            lines.append("  ".join(text).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
    height, width = summary.image_size
    lines.append(
        f"{summary.params:,} parameters ({summary.trainable:,} trainable), "
        f"{summary.macs / 1e6:,.2f} M MACs for one image of {height} x {width} pixels"
    )
    return "\n".join(lines)
