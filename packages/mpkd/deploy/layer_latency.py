"""Seconds of each layer at each number of bits, measured, where this device can compute so.

A processor has kernels for floats and for 8-bit integers. There are none for 2 to 7 bits on a CPU
in ONNX Runtime, so a "latency" of these would be an invention: it is refused. On a GPU the times
are those of TensorRT's engines, which are built outside of this program.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mpkd.quant.cost import LayerFacts, layer_facts, plain_layer
from mpkd.quant.layers import FLOAT
from shared_core.deploy.session import open_session

KERNELS = (8, FLOAT)  # bits that ONNX Runtime computes with on a CPU


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
    check_measurable(candidates, device)
    table = {}
    for facts in layer_facts(net, image_size):
        runs, layer = {}, plain_layer(net, facts.name)
        for bits in sorted({8, *candidates}):
            graph = single_layer_graph(facts, layer, bits, batch_size=batch_size)
            session = open_session(graph.SerializeToString(), threads=threads)
            kind = np.int8 if bits == 8 else np.float32
            runs[bits] = (session, {"x": np.ones((batch_size, *facts.inputs), dtype=kind)})
        table[facts.name] = _median_seconds(runs, repeats)
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


def single_layer_graph(
    facts: LayerFacts, layer: nn.Conv2d | nn.Linear, bits: int, *, batch_size: int
) -> Any:
    """An ONNX model of one layer: ``x`` to ``y``, both int8 at 8 bits, else both float."""
    from onnx import TensorProto, helper, numpy_helper

    weight = layer.weight.detach().cpu().numpy().astype(np.float32)
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
    if isinstance(layer, nn.Conv2d):
        # Above and below, left and right alike: what torch's padding means for these kernels.
        pads = [0, 0] if layer.padding == "valid" else list(_padding(layer))
        nodes.append(
            helper.make_node(
                "Conv", [source, "weight", "bias"], [target], kernel_shape=list(layer.kernel_size),
                strides=list(layer.stride), dilations=list(layer.dilation), group=layer.groups,
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
        [helper.make_tensor_value_info("x", kind, [batch_size, *facts.inputs])],
        [helper.make_tensor_value_info("y", kind, [batch_size, *facts.outputs])],
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
