"""Post-training quantization: fold, quantize, calibrate; no labels and no gradients.

``float_net`` goes the other way: a plain network whose weights lie on their grids, for everything
that takes plain networks (ONNX, ONNX Runtime, OpenVINO, checkpoints).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import per_channel
from mpkd.quant.layers import (
    FLOAT,
    QuantLayer,
    calibrate,
    fold_batch_norms,
    quant_layers,
    quantize_net,
)

BATCH = 64  # images at once while calibrating


def quantize_trained(
    net: nn.Module,
    w_bits: Mapping[str, int],
    a_bits: Mapping[str, int] | None = None,
    *,
    calibration: Tensor | None,
    symmetric: bool = True,
    method: str = "mse",
    learned: bool = False,
    fold: bool = True,
) -> nn.Module:
    """A quantized copy of a trained network.

    Args:
        net: in evaluation mode; it is not changed. Layer names do not change by folding.
        w_bits, a_bits: bits by layer; 32 leaves a part as it is. Layers that are 32 in both, and
            layers without an entry, stay plain.
        calibration: normalised images ``(N, 3, H, W)`` for the ranges of the inputs; may be None
            where no input is quantized.
        symmetric: weights without an offset.
        method: ``mse`` or ``minmax``, for weights and inputs.
        learned: scales get gradients, for training afterwards.
        fold: fold batch norms into the convolutions before. False keeps them, which trains better.

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
    quantize_net(quantized, wanted, inputs, symmetric=symmetric, method=method, learned=learned)
    if any(bits != FLOAT for bits in inputs.values()):
        if calibration is None or len(calibration) == 0:
            raise ValueError("no calibration images, expected some: inputs are to be quantized")
        calibrate(quantized, calibration.split(BATCH), method=method)
    return quantized.eval()


@torch.no_grad()
def float_net(net: nn.Module) -> nn.Module:
    """A plain copy of a quantized network: weights on their grids, inputs not quantized.

    Batch norms that follow a quantized layer are folded too. A symmetric grid stays one: the scale
    of a channel is multiplied by the norm's factor, the integers are the same up to their sign.

    Raises:
        ValueError: the network cannot be traced.
    """
    plain = copy.deepcopy(net).eval()
    for name, layer in quant_layers(plain).items():
        base = layer.base
        base.weight.copy_(layer.quantized_weight())
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, base)
    return fold_batch_norms(plain)


@torch.no_grad()
def stored_integers(layer: QuantLayer) -> tuple[Tensor, Tensor, Tensor]:
    """What a file would hold of a layer: integers, scales and offsets.

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
