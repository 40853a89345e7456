"""Weights that gather at the centres of their bins: less is lost when they are rounded.

Of all weights of a layer that round to the same integer, the mean shall be that integer and the
variance small. Measured in steps of the grid, so that layers and channels compare.

Source: Huang et al. 2022, arXiv:2206.04459, section 3.3 (entropy-aware bin regularisation, weight
    0.1); Han et al. 2021 (bin regularisation). There the bins are summed; here they are averaged,
    so that a layer of 8 bits does not outweigh one of 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpkd.quant.companion import Companion
from mpkd.quant.fake_quant import per_channel
from mpkd.quant.layers import QuantLayer, quant_layers


def bin_term(layer: QuantLayer) -> Tensor:
    """Mean over the bins in use of ``(mean - centre)^2 + variance``, in squared steps."""
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
