"""Post-training quantization: fold, quantize, calibrate; no labels and no gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mpkd.quant.layers import FLOAT, calibrate, fold_batch_norms, quantize_net

BATCH = 64  # images at once while calibrating


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
        options: further ones of :class:`mpkd.quant.layers.QuantLayer`.

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
