"""What bits cost: the size of the weights, and multiplications times bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mpkd.quant.layers import FLOAT, QuantLayer


@dataclass(frozen=True)
class LayerFacts:
    """One convolution or linear layer.

    Attributes:
        name: dotted.
        weights: number of weights, without the bias.
        macs: multiply-accumulates for one image.
    """

    name: str
    weights: int
    macs: int


def layer_facts(net: nn.Module, image_size: int) -> list[LayerFacts]:
    """Weights and MACs of every convolution and linear layer, in the order of the network.

    Args:
        image_size: side in pixels of a square image.
    """
    found: dict[str, LayerFacts] = {}
    hooks = []

    def note(name: str, layer: nn.Module, output: torch.Tensor) -> None:
        weight = layer.weight
        places = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        before = found.get(name)
        macs = weight.numel() * places + (before.macs if before else 0)
        found[name] = LayerFacts(name, weight.numel(), macs)

    inner = {n + ".base" for n, m in net.named_modules() if isinstance(m, QuantLayer)}
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer):
            hooks.append(
                module.register_forward_hook(lambda m, _i, out, name=name: note(name, m.base, out))
            )
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and name not in inner:
            hooks.append(
                module.register_forward_hook(lambda m, _i, out, name=name: note(name, m, out))
            )
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            parameter = next(net.parameters())
            net(parameter.new_zeros(1, 3, image_size, image_size))
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
    rest = sum(p.numel() for p in net.parameters()) - sum(layer.weights for layer in facts)
    scales = 0
    modules = dict(net.named_modules())
    for layer in quantized:
        module = modules[layer.name]
        base = module.base if isinstance(module, QuantLayer) else module
        scales += base.weight.shape[0]
    if any(isinstance(module, QuantLayer) for module in modules.values()):
        rest -= sum(
            p.numel() for n, p in net.named_parameters() if "_quantizer." in n
        )  # counted as scales
    return (weight_bits(facts, w_bits) + 32 * (rest + scales) + 7) // 8
