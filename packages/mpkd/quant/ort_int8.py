"""Int8 by ONNX Runtime: quantize and dequantize nodes in the graph, every zero point 0.

A symmetric int8 graph is what TensorRT's explicit quantization takes; ONNX Runtime computes it with
integers on a CPU. ``check_qdq`` looks at the graph itself, so that a file from elsewhere can be
judged too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpkd.deploy.onnx_session import onnx_session
from shared_core.checkpoints import atomic_write

METHODS = ("minmax", "entropy", "percentile")
HEAVY = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclass(frozen=True)
class QdqFacts:
    """What a quantized graph holds.

    Attributes:
        quantize, dequantize: number of such nodes.
        heavy, heavy_quantized: convolutions and matrix products; those with dequantized data and
            weights.
        kinds: element types of the zero points, ``int8`` and perhaps ``int32`` (biases).
        size_bytes: of the file.
    """

    quantize: int
    dequantize: int
    heavy: int
    heavy_quantized: int
    kinds: tuple[str, ...]
    size_bytes: int


def ort_int8(
    source: str | Path,
    target: str | Path,
    calibration: NDArray[np.float32],
    *,
    method: str = "minmax",
    batch_size: int = 32,
    quantize_bias: bool = True,
) -> QdqFacts:
    """Write an int8 graph with zero points of 0, and check it.

    Weights have a scale for each output channel, activations one for a tensor.

    Args:
        source: ONNX file in float32 with one input of images.
        target: the file to write, weights inside.
        calibration: normalised images float32 ``(N, 3, H, W)``.
        method: how the ranges of the activations are found.
        batch_size: images at once; the last batch may be smaller.
        quantize_bias: biases as int32, which ONNX Runtime's integer kernels want. TensorRT reads
            them as floats: take False for a file that goes there.

    Raises:
        FileNotFoundError: no source.
        ValueError: no images, an unknown method, or a result that does not pass the check.

    Needs the packages onnx and onnxruntime.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: there is no such file, expected a float ONNX model")
    if method not in METHODS:
        raise ValueError(f"calibration method {method!r}: expected one of {', '.join(METHODS)}")
    if calibration.ndim != 4 or not len(calibration):
        raise ValueError(
            f"calibration images have shape {calibration.shape}, expected (N, 3, H, W) with N >= 1"
        )
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    facts: list[QdqFacts] = []

    def save(scratch: Path) -> None:
        quantize_static(
            str(source),
            str(scratch),
            _reader(source, calibration.astype(np.float32), batch_size),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=methods[method],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": quantize_bias,
            },
        )
        facts.append(check_qdq(scratch))

    atomic_write(target, save)
    return facts[-1]


def _reader(source: Path, images: NDArray[np.float32], batch_size: int) -> Any:
    """ONNX Runtime's way to ask for calibration images."""
    from onnxruntime.quantization import CalibrationDataReader

    name = _input_name(source)
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[NDArray[np.float32]] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.rest, None)
            return None if batch is None else {name: batch}

    return Reader()


def _input_name(source: Path) -> str:
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    constants = {one.name for one in graph.initializer}
    names = [one.name for one in graph.input if one.name not in constants]
    if len(names) != 1:
        raise ValueError(f"{source}: inputs {', '.join(names)}, expected one, the images")
    return names[0]


def check_qdq(path: str | Path) -> QdqFacts:
    """Look at a quantized graph: types, zero points, and what is quantized.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no quantization, a zero point that is not 0, a type other than int8 (int32 for
            biases), a scale that is not positive and finite, or a convolution or matrix product
            left in float.
    """
    import onnx
    from onnx import numpy_helper

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected an ONNX model")
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    graph = model.graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    made_by = {name: node for node in graph.node for name in node.output}
    kinds: set[str] = set()
    counts = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    for node in graph.node:
        if node.op_type in counts:
            counts[node.op_type] += 1
            kinds.add(_check_node(path, node, constants))
    if not counts["DequantizeLinear"]:
        raise ValueError(f"{path}: no DequantizeLinear node, expected a quantized graph")
    heavy = [node for node in graph.node if node.op_type in HEAVY]

    def dequantized(name: str) -> bool:
        return name in made_by and made_by[name].op_type == "DequantizeLinear"

    left = [node.name for node in heavy if not all(map(dequantized, node.input[:2]))]
    if left:
        raise ValueError(f"{path}: {left[0]!r} computes in float, expected int8 data and weights")
    return QdqFacts(
        quantize=counts["QuantizeLinear"],
        dequantize=counts["DequantizeLinear"],
        heavy=len(heavy),
        heavy_quantized=len(heavy) - len(left),
        kinds=tuple(sorted(kinds)),
        size_bytes=path.stat().st_size,
    )


def _check_node(path: Path, node: Any, constants: dict[str, NDArray[Any]]) -> str:
    """The type of one node's zero point."""
    scale = constants.get(node.input[1])
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if scale is None or zero is None:
        raise ValueError(f"{path}: {node.name!r} has no constant scale and zero point")
    kind = str(zero.dtype)
    bias = node.op_type == "DequantizeLinear" and kind == "int32"
    if kind != "int8" and not bias:
        raise ValueError(f"{path}: {node.name!r} is {kind}, expected int8")
    if np.any(zero != 0):
        raise ValueError(
            f"{path}: {node.name!r} has zero point {zero.reshape(-1)[0]}, expected 0 everywhere"
        )
    if not (np.all(np.isfinite(scale)) and np.all(scale > 0)):
        raise ValueError(f"{path}: {node.name!r} has a scale that is not positive and finite")
    return kind


def run_onnx(
    path: str | Path, images: NDArray[np.float32], *, batch_size: int = 64, threads: int = 0
) -> NDArray[np.float32]:
    """Logits ``(N, C)`` of an ONNX file for images ``(N, 3, H, W)``.

    Args:
        threads: of the runtime; 0 = its own choice.
    """
    session = onnx_session(path, threads=threads)
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: images[i : i + batch_size].astype(np.float32)})[0]
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)
