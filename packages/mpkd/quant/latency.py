"""Seconds of each layer at each number of bits, measured, where this device can compute so.

A processor has kernels for floats and for 8-bit integers. There are none for 2 to 7 bits on a CPU
in ONNX Runtime, so a "latency" of these would be an invention: it is refused. On a GPU the times
are those of TensorRT's engines, which are built outside of this program.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mpkd.quant.layers import FLOAT, QuantLayer, quantizable

KERNELS = (8, FLOAT)  # bits that ONNX Runtime computes with on a CPU


@dataclass(frozen=True)
class LayerShape:
    """What a layer is given and gives, for one image.

    Attributes:
        name: dotted.
        layer: the convolution or linear layer.
        inputs, outputs: shapes without the batch, ``(C, H, W)`` or ``(C,)``.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@torch.no_grad()
def layer_shapes(net: nn.Module, image_size: int) -> list[LayerShape]:
    """Shapes of every convolution and linear layer (quantized or not), in the order of the network.

    Args:
        image_size: side in pixels of a square image.
    """
    found: dict[str, LayerShape] = {}
    hooks = []
    inner = {f"{n}.base" for n, m in net.named_modules() if isinstance(m, QuantLayer)}
    chosen = {n: m for n, m in net.named_modules() if isinstance(m, QuantLayer)}
    chosen |= {n: net.get_submodule(n) for n in quantizable(net) if n not in inner}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        base = module.base if isinstance(module, QuantLayer) else module
        found[name] = LayerShape(name, base, tuple(args[0].shape[1:]), tuple(output.shape[1:]))

    for name, module in chosen.items():
        hooks.append(
            module.register_forward_hook(lambda m, i, out, name=name: note(name, m, i, out))
        )
    training = net.training
    net.eval()
    try:
        net(next(net.parameters()).new_zeros(1, 3, image_size, image_size))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return [found[n] for n, _ in net.named_modules() if n in found]


def check_measurable(candidates: Sequence[int], device: torch.device | str) -> None:
    """Refuse what has no kernel here.

    Raises:
        ValueError: another device than the CPU, or bits that are neither 8 nor 32.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        raise ValueError(
            f"latencies on {kind!r} are not measured here, expected cpu: a GPU's are those of "
            "TensorRT engines; use the budget size or bops"
        )
    others = sorted(set(candidates) - set(KERNELS))
    if others:
        raise ValueError(
            f"a CPU has no kernels for {', '.join(map(str, others))} bits, expected candidates "
            "[8, 32] for a latency budget; use the budget size or bops for fewer bits"
        )


def latency_table(
    net: nn.Module,
    image_size: int,
    candidates: Sequence[int] = KERNELS,
    *,
    batch_size: int = 1,
    threads: int = 1,
    repeats: int = 30,
    device: torch.device | str = "cpu",
) -> dict[str, dict[int, float]]:
    """Median seconds of every layer alone, with 8-bit integers and with floats.

    Each layer runs as an ONNX graph of its own in ONNX Runtime; the 8-bit one takes and gives
    8-bit integers, as in the middle of a quantized network. The candidates of a layer are timed in
    turns. The sum over the layers leaves out what lies between them: compare sums with sums.

    Args:
        net: not quantized; its weights' values do not matter.
        image_size: side in pixels.
        candidates: of 8 and 32.
        batch_size: images at once.
        threads: of the runtime.
        repeats: timed runs of each; three more warm up.

    Returns:
        Seconds by layer and bits; 8 is always among them.

    Raises:
        ValueError: see :func:`check_measurable`.

    Needs the packages onnx and onnxruntime.
    """
    import onnxruntime

    check_measurable(candidates, device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    table = {}
    for shape in layer_shapes(net, image_size):
        runs = {}
        for bits in sorted({8, *candidates}):
            graph = single_layer_graph(shape, bits, batch_size=batch_size)
            session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            kind = np.int8 if bits == 8 else np.float32
            runs[bits] = (session, {"x": np.ones((batch_size, *shape.inputs), dtype=kind)})
        table[shape.name] = _median_seconds(runs, repeats)
    return table


def _median_seconds(
    runs: Mapping[int, tuple[Any, dict[str, Any]]], repeats: int
) -> dict[int, float]:
    seconds: dict[int, list[float]] = {bits: [] for bits in runs}
    for turn in range(repeats + 3):
        for bits, (session, feed) in runs.items():
            begin = time.perf_counter()
            session.run(None, feed)
            if turn >= 3:
                seconds[bits].append(time.perf_counter() - begin)
    return {bits: float(np.median(values)) for bits, values in seconds.items()}


def single_layer_graph(shape: LayerShape, bits: int, *, batch_size: int) -> Any:
    """An ONNX model of one layer: ``x`` to ``y``, both int8 at 8 bits, else both float."""
    from onnx import TensorProto, helper, numpy_helper

    weight = shape.layer.weight.detach().cpu().numpy().astype(np.float32)
    bias = np.zeros(weight.shape[0], dtype=np.float32)
    whole = bits == 8
    nodes, constants = [], {"bias": bias}
    if whole:
        constants |= {
            "weight_q": np.ones_like(weight, dtype=np.int8),
            "weight_scale": np.full(weight.shape[0], 0.01, dtype=np.float32),
            "weight_zero": np.zeros(weight.shape[0], dtype=np.int8),
            "scale": np.float32(0.05), "zero": np.int8(0),
        }  # fmt: skip
        nodes += [
            helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["x_float"]),
            helper.make_node(
                "DequantizeLinear", ["weight_q", "weight_scale", "weight_zero"], ["weight"], axis=0
            ),
        ]
    else:
        constants["weight"] = weight
    source, target = ("x_float", "y_float") if whole else ("x", "y")
    if isinstance(shape.layer, nn.Conv2d):
        conv = shape.layer
        # Above and below, left and right alike: what torch's padding means for these kernels.
        pads = [0, 0] if conv.padding == "valid" else list(_padding(conv))
        nodes.append(
            helper.make_node(
                "Conv", [source, "weight", "bias"], [target], kernel_shape=list(conv.kernel_size),
                strides=list(conv.stride), dilations=list(conv.dilation), group=conv.groups,
                pads=[*pads, *pads],
            )
        )  # fmt: skip
    else:
        nodes.append(helper.make_node("Gemm", [source, "weight", "bias"], [target], transB=1))
    if whole:
        nodes.append(helper.make_node("QuantizeLinear", ["y_float", "scale", "zero"], ["y"]))
    kind = TensorProto.INT8 if whole else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, [batch_size, *shape.inputs])],
        [helper.make_tensor_value_info("y", kind, [batch_size, *shape.outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="mpkd"
    )


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "same":
        spans = zip(conv.kernel_size, conv.dilation, strict=True)
        return tuple(d * (k - 1) // 2 for k, d in spans)  # type: ignore[return-value]
    return conv.padding  # type: ignore[return-value]  # torch keeps numbers as a pair
