"""Layers with quantisers, and a network whose convolutions and linear layers all have them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mpkd.quant.fake_quant import per_channel
from mpkd.quant.quantizers import ActivationQuantizer, WeightQuantizer

FLOAT = 32  # "bits" of a part that is left as it is
BATCH = 64  # images at once while calibrating


class QuantLayer(nn.Module):
    """A convolution or linear layer that sees its weight and its input on grids.

    Args:
        base: ``nn.Conv2d`` or ``nn.Linear``; its parameters go on being trained.
        w_bits, a_bits: 2 to 16, or 32 for none.
        symmetric: weights without an offset.
        method: how ranges are found, ``mse`` or ``minmax``.
        learned: scales are trained (LSQ for weights, LSQ+ for inputs).
    """

    def __init__(
        self,
        base: nn.Conv2d | nn.Linear,
        *,
        w_bits: int,
        a_bits: int = FLOAT,
        symmetric: bool = True,
        method: str = "mse",
        learned: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(base, (nn.Conv2d, nn.Linear)):
            raise ValueError(f"{type(base).__name__}, expected Conv2d or Linear")
        self.base = base
        self.weight_quantizer = (
            None
            if w_bits == FLOAT
            else WeightQuantizer(
                base.weight, bits=w_bits, symmetric=symmetric, method=method, learned=learned
            )
        )
        self.input_quantizer = (
            None if a_bits == FLOAT else ActivationQuantizer(bits=a_bits, learned=learned)
        )
        self.enabled = True

    @property
    def w_bits(self) -> int:
        """Bits a weight; 32 where it is not quantized."""
        return self.weight_quantizer.bits if self.weight_quantizer else FLOAT

    @property
    def a_bits(self) -> int:
        """Bits an input value; 32 where it is not quantized."""
        return self.input_quantizer.bits if self.input_quantizer else FLOAT

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it."""
        if self.weight_quantizer is None or not self.enabled:
            return self.base.weight
        return self.weight_quantizer(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        if self.input_quantizer is not None and self.enabled:
            x = self.input_quantizer(x)
        return self.apply_weight(x, self.quantized_weight())

    @torch.no_grad()
    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Take the batch norm that follows into weight, bias and grid."""
        base, quantizer = self.base, self.weight_quantizer
        factor = (norm.running_var + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight
        before = 0.0 if base.bias is None else base.bias
        bias = (before - norm.running_mean) * factor
        bias = bias if norm.bias is None else bias + norm.bias
        weight = base.weight if quantizer is None else quantizer(base.weight)
        base.weight = nn.Parameter(weight * per_channel(factor, weight))
        base.bias = nn.Parameter(bias)
        if quantizer is not None:
            quantizer.stretch(factor)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with another weight of the same shape."""
        base = self.base
        if isinstance(base, nn.Linear):
            return F.linear(x, weight, base.bias)
        if type(base).forward is nn.Conv2d.forward:
            return base._conv_forward(x, weight, base.bias)
        # A convolution that pads its input itself, as TensorFlow does.
        return torch.func.functional_call(base, {"weight": weight}, (x,))


def quant_layers(net: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by dotted name, in the order of the network."""
    return {n: module for n, module in net.named_modules() if isinstance(module, QuantLayer)}


def weight_levels(net: nn.Module) -> dict[str, int]:
    """How many values a weight may have, by layer: 3 (symmetric) or 4 at 2 bits."""
    found = {name: layer.weight_quantizer for name, layer in quant_layers(net).items()}
    return {name: one.grid.levels for name, one in found.items() if one is not None}


def quantizable(net: nn.Module) -> list[str]:
    """Dotted names of the convolutions and linear layers, in order."""
    return [n for n, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def bits_for(names: Iterable[str], bits: int, *, first_last: int | None = 8) -> dict[str, int]:
    """The same bits for every layer, but ``first_last`` for the first and the last."""
    names = list(names)
    chosen = dict.fromkeys(names, bits)
    if first_last is not None and names:
        chosen[names[0]] = chosen[names[-1]] = max(first_last, bits)
    return chosen


def quantize_net(
    net: nn.Module,
    w_bits: Mapping[str, int],
    a_bits: Mapping[str, int] | None = None,
    **options: Any,
) -> nn.Module:
    """Put a ``QuantLayer`` around each named layer, in place.

    Fold batch norms first (:func:`fold_batch_norms`) for post-training quantization.

    Args:
        w_bits: bits by layer name; layers that are not named stay as they are.
        a_bits: bits of the inputs by layer name; None leaves all inputs as they are.
        options: of :class:`QuantLayer`.

    Raises:
        ValueError: a name that is no convolution or linear layer of ``net``.
    """
    known = set(quantizable(net))
    for name in [*w_bits, *(a_bits or {})]:
        if name not in known:
            raise ValueError(f"no layer {name!r} to quantize, expected one of {sorted(known)}")
    for name, bits in w_bits.items():
        base, inputs = net.get_submodule(name), (a_bits or {}).get(name, FLOAT)
        put(net, name, QuantLayer(base, w_bits=bits, a_bits=inputs, **options))
    return net


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor], *, method: str = "mse") -> None:
    """Set the ranges of all inputs from images; the network runs unquantized meanwhile.

    Args:
        batches: images ``(N, 3, H, W)``, normalised as in training.
        method: ``mse`` or ``minmax``.

    Raises:
        ValueError: there are no batches.
    """
    layers = [layer for layer in quant_layers(net).values() if layer.input_quantizer is not None]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs: module.input_quantizer.observe(inputs[0])
        )
        for layer in layers
    ]
    training = net.training
    net.eval()
    try:
        with unquantized(net):
            for images in batches:
                net(images)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    for layer in layers:
        layer.input_quantizer.set_range(method=method)


@contextmanager
def unquantized(net: nn.Module) -> Iterator[nn.Module]:
    """Within it all layers compute as if not quantized."""
    layers = quant_layers(net).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield net
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


class _Tracer(torch.fx.Tracer):
    """Does not look into layers, quantized or of a kind of their own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (QuantLayer, nn.Conv2d)) or super().is_leaf_module(module, name)


def trace(net: nn.Module) -> torch.fx.Graph:
    """The network's graph, a quantized layer as one node.

    Raises:
        ValueError: the network cannot be traced.
    """
    try:
        return _Tracer().trace(net)
    except Exception as error:  # a tracer meets whatever a network's own code raises
        raise ValueError(f"{type(net).__name__} cannot be traced: {error}") from None


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """A copy of ``net`` in evaluation mode, each batch norm folded into the convolution before it.

    The convolution may be quantized: then its weights go onto their grid first, and the grid is
    stretched by the norm's factor, so that the whole numbers stay (but for the sign).

    Raises:
        ValueError: the network cannot be traced.
    """
    net = copy.deepcopy(net).eval()
    modules = dict(net.named_modules())
    for node in trace(net).nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if source.op != "call_module" or len(source.users) > 1:
            continue  # someone else needs the convolution's own output
        layer, norm = modules[source.target], modules[node.target]
        if isinstance(layer, QuantLayer) and isinstance(layer.base, nn.Conv2d):
            layer.fold(norm)
        elif isinstance(layer, nn.Conv2d):
            put(net, source.target, fuse_conv_bn_eval(layer, norm))
        else:
            continue
        put(net, node.target, nn.Identity())
    return net


def put(net: nn.Module, name: str, module: nn.Module) -> None:
    """``module`` in the place of the one of a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)


def quantize_trained(
    net: nn.Module,
    w_bits: Mapping[str, int],
    a_bits: Mapping[str, int] | None = None,
    *,
    calibration: Tensor | None,
    method: str = "mse",
    fold: bool = True,
    **options: Any,
) -> nn.Module:
    """A quantized copy of a trained network.

    Args:
        net: in evaluation mode; it is not changed. Layer names do not change by folding.
        w_bits, a_bits: bits by layer; 32 leaves a part as it is. Layers that are 32 in both, and
            layers without an entry, stay plain.
        calibration: normalised images ``(N, 3, H, W)`` for the ranges of the inputs; may be None
            where no input is quantized.
        method: ``mse`` or ``minmax``, for weights and inputs.
        fold: fold batch norms into the convolutions before. False keeps them, which trains better.
        options: further ones of :class:`QuantLayer`.

    Raises:
        ValueError: an unknown layer, or inputs to calibrate without images.
    """
    a_bits = dict(a_bits or {})
    quantized = fold_batch_norms(net) if fold else copy.deepcopy(net).eval()
    wanted = {
        name: bits
        for name, bits in w_bits.items()
        if bits != FLOAT or a_bits.get(name, FLOAT) != FLOAT
    }
    inputs = {name: a_bits.get(name, FLOAT) for name in wanted}
    quantize_net(quantized, wanted, inputs, method=method, **options)
    if any(bits != FLOAT for bits in inputs.values()):
        if calibration is None or len(calibration) == 0:
            raise ValueError("no calibration images, expected some: inputs are to be quantized")
        calibrate(quantized, calibration.split(BATCH), method=method)
    return quantized.eval()
