"""A quantized network as it is shipped: whole numbers, their scales and offsets, norms folded in.

What is measured, exported and packed is this form, so that all of them are one network. Packed, its
weights are bytes: 2 bits a weight are four to a byte, 3 are eight to three bytes, and what comes
back is the same bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mpkd.quant.fake_quant import SMALLEST_SCALE, per_channel
from mpkd.quant.layers import QuantLayer, fold_batch_norms, put, quant_layers

Array = npt.NDArray[np.generic]
INPUTS = "input_grids"  # a row a layer: scale, offset, whether it has one, LSQ's factor


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


# -- as bytes --------------------------------------------------------------------------------------


def pack_bits(values: npt.NDArray[np.integer], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers ``(N,)`` from 0 to ``2 ** bits - 1`` in ``ceil(N * bits / 8)`` bytes."""
    ones = (values.reshape(-1, 1).astype(np.int64) >> np.arange(bits)) & 1
    return np.packbits(ones.astype(np.uint8), bitorder="little")


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int64]:
    """The ``count`` numbers that :func:`pack_bits` packed."""
    ones = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return ones.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))


def packed_arrays(net: nn.Module) -> dict[str, Array]:
    """Everything of a shipped network, its quantized weights packed.

    Names are those of the state dict; of a quantized layer ``<layer>.packed`` (bytes), ``.scale``
    float32 ``(out,)``, where the grid has one ``.offset`` int32 ``(out,)``, and the bias.
    """
    layers = quant_layers(net)
    own = tuple(f"{name}." for name in layers)
    kept = {
        name: value.detach().cpu().numpy()
        for name, value in net.state_dict().items()
        if not name.startswith(own)
    }
    grids = []
    for name, layer in layers.items():
        kept |= _of_layer(name, layer)
        q = layer.input_quantizer
        if q is not None:
            row = (q.scale, q.zero_point, q.offset, q.factor)
            grids.append([float(value.detach()) for value in row])
    if grids:
        kept[INPUTS] = np.array(grids, np.float32)
    return kept


def _of_layer(name: str, layer: QuantLayer) -> dict[str, Array]:
    found: dict[str, Array] = {}
    if layer.base.bias is not None:
        found[f"{name}.bias"] = layer.base.bias.detach().cpu().numpy()
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return found | {f"{name}.weight": layer.base.weight.detach().cpu().numpy()}
    integers, scale, offset = (value.cpu().numpy() for value in stored_integers(layer))
    found[f"{name}.packed"] = pack_bits(integers - quantizer.grid.low, quantizer.bits)
    found[f"{name}.scale"] = scale
    if not quantizer.symmetric:
        found[f"{name}.offset"] = offset
    return found


@torch.no_grad()
def unpack_into(net: nn.Module, arrays: Mapping[str, Tensor]) -> None:
    """Fill a network whose layers are quantized alike with what :func:`packed_arrays` gave.

    Raises:
        KeyError, ValueError, RuntimeError: arrays of another network.
    """
    layers = quant_layers(net)
    own = tuple(f"{name}." for name in layers)
    plain = {name: value for name, value in arrays.items() if not name.startswith((*own, INPUTS))}
    missing = net.load_state_dict(plain, strict=False).missing_keys
    if odd := [name for name in missing if not name.startswith(own)]:
        raise KeyError(odd[0])
    rows = iter(arrays.get(INPUTS, ()))
    for name, layer in layers.items():
        _fill(layer, name, arrays)
        if layer.input_quantizer is not None:
            scale, zero, offset, factor = next(rows)
            layer.input_quantizer.load_state_dict(
                {"scale": scale, "zero_point": zero, "offset": offset.bool(), "factor": factor,
                 "ready": torch.tensor(True)}
            )  # fmt: skip


def _fill(layer: QuantLayer, name: str, arrays: Mapping[str, Tensor]) -> None:
    weight, quantizer = layer.base.weight, layer.weight_quantizer
    if layer.base.bias is not None:
        layer.base.bias.copy_(arrays[f"{name}.bias"])
    if quantizer is None:
        weight.copy_(arrays[f"{name}.weight"])
        return
    quantizer.scale.copy_(arrays[f"{name}.scale"])
    if not quantizer.symmetric:
        quantizer.zero_point.copy_(arrays[f"{name}.offset"])
    packed = arrays[f"{name}.packed"].numpy()
    values = unpack_bits(packed, quantizer.bits, weight.numel()) + quantizer.grid.low
    integers = torch.from_numpy(values).reshape(weight.shape).to(torch.int32)
    weight.copy_(from_integers(integers, quantizer.scale, quantizer.zero_point))
