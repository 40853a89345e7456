"""The student's own grids in an ONNX file: Q/DQ nodes with the scales that it was trained with.

The file is made from the float network whose weights lie on their grids; here the weights become
the integers that they stand for, and every quantized input is clipped, rounded and dequantized as
in :mod:`mpkd.quant.fake_quant`. ONNX Runtime computes such a file with 8-bit integers; 2 to 7 bits
are stored in 8 here (:mod:`mpkd.quant.shipped` packs them in as many as they have).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mpkd.quant.layers import QuantLayer, quant_layers
from mpkd.quant.quantizers import ActivationQuantizer
from mpkd.quant.shipped import stored_integers
from shared_core.deploy.check import ExportError

WIDE_OPSET = 21  # of integers of 16 bits


def opset_for(net: nn.Module) -> int | None:
    """The least version of ONNX's operators that ``net`` needs; None where any will do."""
    layers = quant_layers(net).values()
    parts = [q for one in layers for q in (one.weight_quantizer, one.input_quantizer)]
    return WIDE_OPSET if any(q is not None and q.bits > 8 for q in parts) else None


def with_own_grids(model: Any, net: nn.Module) -> Any:
    """The float ``onnx.ModelProto`` of a shipped network, with its grids in it.

    Args:
        model: of ``plain(net)``, weights under the names of the state dict; changed in place.
        net: as :func:`mpkd.quant.shipped.shipped` makes it.

    Raises:
        ExportError: a quantized layer is not in the graph.
    """
    graph, layers, nodes = model.graph, dict(quant_layers(net)), []
    for node in list(graph.node):
        name = (node.input[1] if len(node.input) > 1 else "").removesuffix(".weight")
        layer = layers.pop(name, None)
        if layer is not None and layer.input_quantizer is not None:
            made = _grid(graph, name, node.input[0], layer.input_quantizer)
            nodes += made
            node.input[0] = made[-1].output[0]
        if layer is not None and layer.weight_quantizer is not None:
            made = [_integers(graph, node.input[1], layer)]
            nodes += made
            node.input[1] = made[-1].output[0]
        nodes.append(node)
    if layers:
        raise ExportError(f"the graph has no layer with the weights of {next(iter(layers))!r}")
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _integers(graph: Any, weight: str, layer: QuantLayer) -> Any:
    """Replace a float weight by its integers; the node that dequantizes them."""
    from onnx import helper

    integers, scale, offset = (value.cpu().numpy() for value in stored_integers(layer))
    quantizer = layer.weight_quantizer
    kind = _kind(quantizer.bits, signed=quantizer.symmetric)
    old = next(one for one in graph.initializer if one.name == weight)
    turned = tuple(old.dims) != integers.shape  # a product wants the other order
    if turned and tuple(old.dims) != integers.T.shape:
        raise ExportError(f"{weight} is {tuple(old.dims)} in the graph, expected {integers.shape}")
    graph.initializer.remove(old)
    parts = [f"{weight}/q", f"{weight}/scale", f"{weight}/zero"]
    values = (integers.T if turned else integers).astype(kind)
    for name, value in zip(parts, (values, scale, offset.astype(kind)), strict=True):
        _constant(graph, name, value)
    made = f"{weight}/dq"
    return helper.make_node("DequantizeLinear", parts, [made], name=made, axis=int(turned))


def _grid(graph: Any, name: str, values: str, quantizer: ActivationQuantizer) -> list[Any]:
    """Nodes that clip, quantize and dequantize a layer's input."""
    from onnx import helper

    grid, scale = quantizer.grid, np.float32(quantizer.scale.item())
    zero = round(quantizer.zero_point.item()) if quantizer.has_offset else 0
    zero = min(max(zero, grid.low), grid.high)
    kind, nodes = _kind(grid.bits, signed=False), []
    if grid.high != np.iinfo(kind).max:  # the type holds more integers than the grid
        ends = {"low": grid.low - zero, "high": grid.high - zero}
        for end, value in ends.items():
            _constant(graph, f"{name}/{end}", np.float32(value * scale))
        clip = [values, *(f"{name}/{end}" for end in ends)]
        values = f"{name}/clipped"
        nodes.append(helper.make_node("Clip", clip, [values]))
    _constant(graph, f"{name}/scale", scale)
    _constant(graph, f"{name}/zero", np.array(zero, kind))
    grids = [f"{name}/scale", f"{name}/zero"]
    nodes += [
        helper.make_node("QuantizeLinear", [values, *grids], [f"{name}/q"]),
        helper.make_node("DequantizeLinear", [f"{name}/q", *grids], [f"{name}/dq"]),
    ]
    for one in nodes:
        one.name = one.output[0]
    return nodes


def _kind(bits: int, *, signed: bool) -> type[np.integer[Any]]:
    return {(8, True): np.int8, (8, False): np.uint8, (16, True): np.int16,
            (16, False): np.uint16}[8 if bits <= 8 else 16, signed]  # fmt: skip


def _constant(graph: Any, name: str, value: npt.NDArray[Any] | np.generic) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
