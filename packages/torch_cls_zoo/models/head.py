"""Where a network's last layer, its head, lies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def head_names(model: nn.Module, num_classes: int) -> list[str]:
    """Names of the modules that give the logits; one, or two for networks with a second head.

    timm names them itself. For others it is the last linear layer or convolution that has
    ``num_classes`` outputs.

    Raises:
        ValueError: no such layer.
    """
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if hasattr(config, "get") else None
    modules = dict(model.named_modules())
    if named:
        wanted = [named] if isinstance(named, str) else list(named)
        found = [name for name in wanted if outputs(modules.get(name)) == num_classes]
        if found:
            return found
    for name in reversed(list(modules)):
        if outputs(modules[name]) == num_classes:
            return [name]
    raise ValueError(f"{type(model).__name__} has no layer with {num_classes} outputs")


def outputs(layer: nn.Module | None) -> int | None:
    """Outputs of a linear layer or convolution; None for anything else."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) else None


def head_keys(heads: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Those of a state dict's ``keys`` that belong to the ``heads``."""
    prefixes = tuple(f"{head}." for head in heads)
    return [key for key in keys if key.startswith(prefixes)]
