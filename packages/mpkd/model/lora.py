"""Low-rank adapters on convolutions and linear layers: few numbers to train, merged at the end.

``W' = W + (alpha / r) * B A``. For a linear layer ``A`` is ``(r, in)`` and ``B`` ``(out, r)``; for
a convolution ``A`` is one of the same kernel, stride and padding into ``r`` channels and ``B`` one
of 1 x 1. ``B`` begins at zero, so the adapted network begins as the original.

Source: Hu et al. 2022, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_core.for_torch.checkpoints import fit_into


class LoraLayer(nn.Module):
    """A frozen convolution or linear layer with its trained low-rank addition.

    Args:
        base: ``nn.Conv2d`` or ``nn.Linear``; a convolution of ``g`` groups needs ``g`` to divide
            ``rank``.
        rank: ``r >= 1``.
        alpha: scale of the addition times ``r``.
        dropout: probability in ``[0, 1)`` on the addition's input.

    Raises:
        ValueError: another kind of layer, or a rank that does not fit.
    """

    def __init__(self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank is {rank}, expected 1 or more")
        self.base, self.scale = base, alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if isinstance(base, nn.Conv2d):
            if rank % base.groups:
                raise ValueError(
                    f"LoRA rank is {rank}, expected a multiple of the convolution's "
                    f"{base.groups} groups"
                )
            if base.padding_mode != "zeros":
                raise ValueError(f"padding mode {base.padding_mode!r}, expected zeros")
            kernel = tuple(base.weight.shape[1:])
            self.lora_a = nn.Parameter(base.weight.new_empty(rank, *kernel))
            self.lora_b = nn.Parameter(
                base.weight.new_zeros(base.out_channels, rank // base.groups, 1, 1)
            )
        elif isinstance(base, nn.Linear):
            self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
            self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        else:
            raise ValueError(f"LoRA on {type(base).__name__}, expected Conv2d or Linear")
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        base.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output plus the addition."""
        base, extra = self.base, self.dropout(inputs)
        if isinstance(base, nn.Conv2d):
            low = F.conv2d(
                extra, self.lora_a, None, base.stride, base.padding, base.dilation, base.groups
            )
            return base(inputs) + self.scale * F.conv2d(low, self.lora_b, groups=base.groups)
        return base(inputs) + self.scale * F.linear(F.linear(extra, self.lora_a), self.lora_b)

    def delta(self) -> Tensor:
        """``(alpha / r) * B A`` in the shape of the base's weight."""
        groups = self.base.groups if isinstance(self.base, nn.Conv2d) else 1
        a = self.lora_a.reshape(groups, self.lora_a.shape[0] // groups, -1)
        b = self.lora_b.reshape(groups, self.lora_b.shape[0] // groups, -1)
        return (self.scale * (b @ a)).reshape(self.base.weight.shape)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with the addition in its weight."""
        self.base.weight += self.delta()
        return self.base


def add_lora(
    net: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    trained: Iterable[str] = (),
) -> list[str]:
    """Put adapters into ``net`` in place and freeze everything else.

    Args:
        targets: parts of dotted layer names to adapt; None = every linear layer and every 3 x 3
            convolution, where these are depthwise every 1 x 1 one.
        trained: dotted names of layers that are trained whole (a new head).

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: nothing fits ``targets``, or a name in ``trained`` is no layer.
    """
    whole = set(trained)
    unknown = whole - {name for name, _ in net.named_modules()}
    if unknown:
        raise ValueError(f"no layer {sorted(unknown)[0]!r} to train whole")
    net.requires_grad_(False)
    kernel = (1, 1) if any(getattr(m, "groups", 1) > 1 for m in net.modules()) else (3, 3)
    found = [
        name
        for name, module in net.named_modules()
        if name not in whole and _adaptable(name, module, targets, kernel)
    ]
    if not found:
        raise ValueError(f"no convolution or linear layer has one of {targets} in its name")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        owner = net.get_submodule(parent)
        layer = LoraLayer(getattr(owner, leaf), rank=rank, alpha=alpha, dropout=dropout)
        setattr(owner, leaf, layer)
    for name in whole:
        net.get_submodule(name).requires_grad_(True)
    return found


def _adaptable(
    name: str, module: nn.Module, targets: Sequence[str] | None, kernel: tuple[int, int]
) -> bool:
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return False
    if targets is not None:
        return any(part in name for part in targets)
    return isinstance(module, nn.Linear) or module.kernel_size == kernel


def freeze_norm_statistics(net: nn.Module) -> None:
    """Put every batch norm in evaluation mode: its running mean and variance stay.

    Call it after each ``net.train()``; frozen weights alone do not keep the statistics still.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def merge_lora(net: nn.Module) -> nn.Module:
    """Take the adapters out of ``net`` in place, their additions merged into the weights."""
    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, module.merged())
    return net


def adapter_weights(net: nn.Module) -> dict[str, Tensor]:
    """What training changed: the adapters and the layers trained whole, by name."""
    wanted = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in net.state_dict().items() if name in wanted}


def load_adapters(net: nn.Module, weights: dict[str, Tensor], *, path: str | Path) -> None:
    """Put saved adapters into a network that ``add_lora`` prepared alike.

    Raises:
        ValueError: a name or shape that does not fit.
    """
    expected = adapter_weights(net)
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))[0]
        raise ValueError(f"{path}: adapter {odd!r} does not fit this network's adapters")
    fit_into(net, {**net.state_dict(), **weights}, path=path)
