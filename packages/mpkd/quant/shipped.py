"""A quantized network as it is shipped: whole numbers, their scales and offsets, norms folded in.

What is measured, exported and packed is this form, so that all of them are one network.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import SMALLEST_SCALE, per_channel
from mpkd.quant.layers import QuantLayer, fold_batch_norms, put, quant_layers


@torch.no_grad()
def shipped(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode: batch norms folded, every weight exactly what a file gives back.

    Raises:
        ValueError: the network cannot be traced.
    """
    made = fold_batch_norms(net)
    for layer in quant_layers(made).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                quantizer.scale.clamp_(min=SMALLEST_SCALE)
        if layer.weight_quantizer is not None:
            layer.base.weight.copy_(from_integers(*stored_integers(layer)))
    return made


def plain(net: nn.Module) -> nn.Module:
    """A copy without quantisers: the weights as they are, the inputs not quantized."""
    made = copy.deepcopy(net).eval()
    for name, layer in quant_layers(made).items():
        put(made, name, layer.base)
    return made


@torch.no_grad()
def stored_integers(layer: QuantLayer) -> tuple[Tensor, Tensor, Tensor]:
    """What a file holds of a layer's weight: integers, scales and offsets.

    Returns:
        int32 ``(out, ...)``, float ``(out,)``, int32 ``(out,)``:
        ``weight = scale * (integers - offset)``.

    Raises:
        ValueError: the layer's weights are not quantized.
    """
    quantizer = layer.weight_quantizer
    if quantizer is None:
        raise ValueError("the layer's weights are not quantized, expected bits below 32")
    integers = quantizer.integers(layer.base.weight)
    return integers, quantizer.scale.detach(), quantizer.zero_point.to(torch.int32)


def from_integers(integers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The weight that :func:`stored_integers` describes, float32."""
    shifted = integers.to(scale.dtype) - per_channel(offset.to(scale.dtype), integers)
    return shifted * per_channel(scale, integers)
