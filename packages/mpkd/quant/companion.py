"""What may learn beside a network, or pull at it: told of every step, with a term in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import per_channel
from mpkd.quant.layers import QuantLayer, quant_layers


class Companion:
    """Does nothing; a search or a regulariser says what it does instead.

    Whatever trains the network calls ``before_step``, adds ``term`` to the loss of every batch,
    steps, and calls ``after_step``. Its state is kept with that of the training.
    """

    def tensors(self) -> Sequence[Tensor]:
        """What has gradients and is no parameter of the network: averaged over the processes."""
        return ()

    def before_step(self, step: int, total: int) -> None:
        """Step ``step`` (from 0) of ``total`` begins."""

    def term(self, net: nn.Module) -> Tensor | None:
        """What is added to the loss, a scalar; None for nothing."""
        return None

    def after_step(self) -> None:
        """The step is done; gradients of what is no parameter of the network are still there."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""


def bin_term(layer: QuantLayer) -> Tensor:
    """How far a layer's weights are from the centres of their bins, in squared steps of the grid.

    Of all weights that round to the same integer the mean shall be that integer and the variance
    small: ``(mean - centre)^2 + variance``, averaged over the bins in use (in the papers they are
    summed, so that a layer of 8 bits outweighs one of 2).

    Source: Huang et al. 2022, arXiv:2206.04459, section 3.3 (entropy-aware bin regularisation,
        weight 0.1); Han et al. 2021 (bin regularisation).
    """
    quantizer, weight = layer.weight_quantizer, layer.base.weight
    scale = per_channel(quantizer.scale.detach(), weight)
    zero = per_channel(quantizer.zero_point, weight)
    places = (weight / scale + zero).reshape(-1)
    centres = quantizer.integers(weight).reshape(-1)
    index = (centres - quantizer.grid.low).long()
    bins = quantizer.grid.high - quantizer.grid.low + 1
    count = torch.bincount(index, minlength=bins).to(places.dtype)
    used = count > 0
    count = count.clamp(min=1)
    empty = places.new_zeros(bins)
    mean = empty.index_add(0, index, places) / count
    variance = empty.index_add(0, index, (places - mean[index]).square()) / count
    wanted = torch.arange(bins, device=places.device, dtype=places.dtype) + quantizer.grid.low
    return ((mean - wanted).square() + variance)[used].mean()


class BinPull(Companion):
    """Adds ``strength`` times the mean of :func:`bin_term` over the quantized layers to the loss.

    Args:
        strength: 0.1 in the paper; 0 adds nothing.
    """

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def term(self, net: nn.Module) -> Tensor | None:
        """The regulariser of the weights as they are now."""
        layers = [one for one in quant_layers(net).values() if one.weight_quantizer is not None]
        if not layers or not self.strength:
            return None
        return self.strength * torch.stack([bin_term(layer) for layer in layers]).mean()
