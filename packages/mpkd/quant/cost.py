"""What bits cost: the size of the weights, and multiplications times bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mpkd.quant.layers import FLOAT, QuantLayer, quant_layers, quantizable


@dataclass(frozen=True)
class LayerFacts:
    """One convolution or linear layer.

    Attributes:
        name: dotted.
        weights: number of weights, without the bias.
        macs: multiply-accumulates for one image.
        inputs, outputs: shapes without the batch, ``(C, H, W)`` or ``(C,)``.
    """

    name: str
    weights: int
    macs: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def plain_layer(net: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """The convolution or linear layer of a dotted name, also where it is quantized."""
    module = net.get_submodule(name)
    return module.base if isinstance(module, QuantLayer) else module  # type: ignore[return-value]


@torch.no_grad()
def layer_facts(net: nn.Module, image_size: int) -> list[LayerFacts]:
    """Every convolution and linear layer (quantized or not) in the order in which they compute.

    Args:
        image_size: side in pixels of a square image.
    """
    found: dict[str, LayerFacts] = {}
    inner = {f"{n}.base" for n in quant_layers(net)}
    names = [n for n in (*quant_layers(net), *quantizable(net)) if n not in inner]

    def note(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        layer = plain_layer(net, name)
        count = layer.weight.numel()
        places = math.prod(outputs[1:] if isinstance(layer, nn.Conv2d) else outputs[:-1])
        before = found[name].macs if name in found else 0
        found[name] = LayerFacts(name, count, before + count * places, inputs, outputs)

    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda _m, given, out, name=name: note(name, tuple(given[0].shape[1:]),
                                                   tuple(out.shape[1:]))
        )
        for name in names
    ]  # fmt: skip
    training = net.training
    try:
        net.eval()(next(net.parameters()).new_zeros(1, 3, image_size, image_size))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return list(found.values())


def weight_bits(facts: list[LayerFacts], w_bits: Mapping[str, int]) -> int:
    """Bits of all weights; layers that ``w_bits`` does not name have 32 a weight."""
    return sum(layer.weights * w_bits.get(layer.name, FLOAT) for layer in facts)


def mean_bits(facts: list[LayerFacts], w_bits: Mapping[str, int]) -> float:
    """Bits a weight on average."""
    return weight_bits(facts, w_bits) / sum(layer.weights for layer in facts)


def bit_operations(
    facts: list[LayerFacts], w_bits: Mapping[str, int], a_bits: Mapping[str, int]
) -> int:
    """Sum over the layers of MACs times weight bits times input bits, for one image.

    Source: van Baalen et al. 2020, arXiv:2005.07093, section 4 (BOPs).
    """
    return sum(
        layer.macs * w_bits.get(layer.name, FLOAT) * a_bits.get(layer.name, FLOAT)
        for layer in facts
    )


def size_bytes(net: nn.Module, facts: list[LayerFacts], w_bits: Mapping[str, int]) -> int:
    """Bytes of the stored network: weights at their bits, everything else in 32.

    A quantized layer also stores one 32-bit scale for each output channel.
    """
    quantized = [layer for layer in facts if w_bits.get(layer.name, FLOAT) != FLOAT]
    plain = sum(p.numel() for n, p in net.named_parameters() if "_quantizer." not in n)
    rest = plain - sum(layer.weights for layer in facts)
    scales = sum(plain_layer(net, layer.name).weight.shape[0] for layer in quantized)
    return (weight_bits(facts, w_bits) + 32 * (rest + scales) + 7) // 8
