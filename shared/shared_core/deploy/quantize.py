"""Static int8: a float ONNX file with quantize and dequantize nodes, its ranges from images.

Weights have a scale for each output channel, activations one for a tensor. Layers with weights
become int8, and in convolutional networks what lies between them as well (additions, pooling), so
that the numbers stay integers. Attention's products, norms and the normalisation of the images stay
float.

Source: Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.checkpoints.atomic import atomic_write
from shared_core.deploy.graph import LAYERS, OWN, input_of

Array = npt.NDArray[Any]
METHODS = ("minmax", "entropy", "percentile")
SCHEMES = ("u8s8", "s8s8")
CLAMPS = ("Clip", "Relu")  # become part of the layer before them
GLUE = (
    "Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Reshape",
    "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
KINDS = (*LAYERS, *CLAMPS, *GLUE)
_NORMS = {
    "LayerNormalization",
    "Softmax",
    "Erf",
    "Gelu",
    "Sqrt",
}  # a network that has them has no glue
BATCH = 16  # most images of a calibration step


@dataclass(frozen=True)
class QdqFacts:
    """What a quantized graph holds.

    Attributes:
        quantize, dequantize: number of such nodes.
        heavy: convolutions and products with a weight.
        heavy_quantized: those whose data and weights are dequantized integers.
        kinds: element types of the zero points.
        symmetric: whether every zero point is 0 of int8 (int32 for biases), as TensorRT wants it.
        size_bytes: of the file.
    """

    quantize: int
    dequantize: int
    heavy: int
    heavy_quantized: int
    kinds: tuple[str, ...]
    symmetric: bool
    size_bytes: int


class Quantizer:
    """A float model whose activations' ranges are known: any of its layers can be made int8.

    Args:
        source: an ONNX file (or ``ModelProto``) with one input.
        batches: what the input takes, like what will come: uint8 images ``(N, H, W, 3)`` of a
            wrapped network, tokens of a chain's later segment. Parts of at most 16 are looked at.
        scheme: ``u8s8`` (activations uint8 with any zero point: exact ranges, what ONNX Runtime's
            CPU kernels like) or ``s8s8`` (all zero points 0, as TensorRT wants it).
        method: how a range is found: ``minmax`` takes all values, ``percentile`` leaves out the
            largest 0.001 %, ``entropy`` cuts where least is lost.
        quantize_bias: biases as int32, which integer kernels want; TensorRT reads them as floats.
        glue: whether what lies between the layers becomes int8, too; None: in networks without
            attention and layer norms.

    Attributes:
        layers: names of the layers with weights, in order.
        has_glue: whether there is something between them that can be int8.

    Raises:
        ValueError: no batches, an unknown method or scheme, or no layer that could become int8.

    Needs the packages onnx and onnxruntime.
    """

    def __init__(
        self,
        source: str | Path | Any,
        batches: Iterable[Array],
        *,
        scheme: str = "u8s8",
        method: str = "minmax",
        quantize_bias: bool = True,
        glue: bool | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"int8: method is {method!r}, expected one of {', '.join(METHODS)}")
        if scheme not in SCHEMES:
            raise ValueError(f"int8: scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
        parts = [b[i : i + BATCH] for b in batches for i in range(0, len(b), BATCH)]
        if not parts:
            raise ValueError("int8: no calibration images, expected at least one")
        self._scheme, self._bias = scheme, quantize_bias
        with tempfile.TemporaryDirectory() as folder, _quiet():
            self._model = _prepared(source, Path(folder) / "folded.onnx")
            nodes = [n for n in self._model.graph.node if not n.name.startswith(OWN)]
            weights = {one.name for one in self._model.graph.initializer}
            self.layers = tuple(
                n.name for n in nodes
                if n.op_type in LAYERS and len(n.input) > 1 and n.input[1] in weights
            )  # fmt: skip
            if not self.layers:
                raise ValueError("int8: no convolution or linear layer in the network")
            self._clamps = [n.name for n in nodes if n.op_type in CLAMPS]
            between = [n.name for n in nodes if n.op_type in GLUE]
            if glue is None:
                glue = not any(n.op_type in _NORMS for n in nodes)
            self._glue = tuple(between) if glue else ()
            self._ranges = _ranges(self._model, parts, Path(folder), method, scheme == "s8s8")

    @property
    def has_glue(self) -> bool:
        """Whether something between the layers becomes int8, too."""
        return bool(self._glue)

    def model(self, *, keep_float: Iterable[str] = (), glue: bool = True) -> Any:
        """The int8 ``ModelProto``.

        Args:
            keep_float: names out of ``layers`` that stay float.
            glue: False leaves all between the layers float.

        Raises:
            ValueError: a name that no layer has.
        """
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        kept = set(keep_float)
        if unknown := kept - set(self.layers):
            raise ValueError(
                f"int8: no layer is called {sorted(unknown)[0]!r}, expected some of "
                f"{', '.join(self.layers)}"
            )
        names = [name for name in self.layers if name not in kept]
        if not names:
            return copy.deepcopy(self._model)
        symmetric = self._scheme == "s8s8"
        with _quiet():
            quantizer = QDQQuantizer(
                copy.deepcopy(self._model),
                True,  # a scale for each channel
                False,  # all 8 bits
                QuantType.QInt8,
                QuantType.QInt8 if symmetric else QuantType.QUInt8,
                self._ranges,
                [*names, *self._clamps, *(self._glue if glue else ())],
                [],
                list(KINDS),
                {
                    "ActivationSymmetric": symmetric,
                    "WeightSymmetric": True,
                    "MatMulConstBOnly": True,
                    "QuantizeBias": self._bias,
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        return quantizer.model.model

    def write(
        self, target: str | Path, *, keep_float: Iterable[str] = (), glue: bool = True
    ) -> QdqFacts:
        """Write the int8 file; what it holds. Arguments as for :meth:`model`.

        Raises:
            OSError: it cannot be written; an older one is untouched.
        """
        import onnx

        model = self.model(keep_float=keep_float, glue=glue)
        atomic_write(target, lambda scratch: onnx.save(model, str(scratch)))
        return qdq_facts(target)


def quantize_static(
    source: str | Path | Any,
    target: str | Path,
    batches: Iterable[Array],
    *,
    keep_float: Iterable[str] = (),
    **settings: Any,
) -> QdqFacts:
    """Write an int8 version of a float ONNX file in one go.

    Args:
        settings: ``scheme``, ``method``, ``quantize_bias``, ``glue`` of :class:`Quantizer`.

    Returns:
        What the file holds.
    """
    return Quantizer(source, batches, **settings).write(target, keep_float=keep_float)


def quantize_dynamic(source: str | Path, target: str | Path) -> QdqFacts:
    """An int8 version without images: matrix products alone, ranges found anew for each batch.

    It needs no calibration, but answers depend a little on what else is in the batch.

    Raises:
        ValueError: no product with a weight in the network.
    """
    from onnxruntime import quantization as q

    def write(scratch: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            model = _prepared(source, Path(folder) / "folded.onnx")
            weights = {one.name for one in model.graph.initializer}
            products = [n for n in model.graph.node if n.op_type == "MatMul"]
            names = [n.name for n in products if n.input[1] in weights]
            if not names:
                raise ValueError(f"int8: {source} has no product with a weight")
            del model.graph.value_info[:]  # weights are transposed, but not their entries there
            q.quantize_dynamic(
                model, str(scratch), nodes_to_quantize=names, op_types_to_quantize=["MatMul"],
                per_channel=True, weight_type=q.QuantType.QInt8,
            )  # fmt: skip

    atomic_write(target, write)
    return qdq_facts(target)


def qdq_facts(path: str | Path) -> QdqFacts:
    """Look at a quantized graph: types, zero points, and what is quantized.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a scale or zero point that is no constant, or a scale that is not positive and
            finite.
    """
    import onnx
    from onnx import numpy_helper

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected an ONNX model")
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    graph = model.graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    made = {name: node for node in graph.node for name in node.output}
    nodes = {kind: [n for n in graph.node if n.op_type == kind]
             for kind in ("QuantizeLinear", "DequantizeLinear")}  # fmt: skip
    zeros = [_zero_point(path, node, constants) for node in sum(nodes.values(), [])]

    def from_integers(name: str) -> bool:
        return name in made and made[name].op_type == "DequantizeLinear"

    heavy = [n for n in graph.node if n.op_type in LAYERS and len(n.input) > 1]
    heavy = [n for n in heavy if n.input[1] in constants or from_integers(n.input[1])]
    dynamic = [n for n in graph.node if n.op_type in ("MatMulInteger", "ConvInteger")]
    return QdqFacts(
        quantize=len(nodes["QuantizeLinear"]),
        dequantize=len(nodes["DequantizeLinear"]),
        heavy=len(heavy) + len(dynamic),
        heavy_quantized=sum(all(map(from_integers, n.input[:2])) for n in heavy) + len(dynamic),
        kinds=tuple(sorted({str(zero.dtype) for zero in zeros})),
        symmetric=bool(zeros)
        and all(z.dtype in (np.int8, np.int32) and not np.any(z) for z in zeros),
        size_bytes=path.stat().st_size,
    )


def check_symmetric(path: str | Path) -> QdqFacts:
    """Refuse a file that TensorRT's explicit quantization would not take.

    Raises:
        ValueError: a zero point that is not 0 of int8, quantized biases, or a layer with weights
            that computes in float.
    """
    found = qdq_facts(path)
    if not found.dequantize:
        raise ValueError(f"{path}: no DequantizeLinear node, expected a quantized graph")
    if not found.symmetric:
        raise ValueError(f"{path}: a zero point is not 0 of int8, expected 0 everywhere")
    if "int32" in found.kinds:
        raise ValueError(f"{path}: quantized biases, expected them as floats")
    if left := found.heavy - found.heavy_quantized:
        raise ValueError(f"{path}: {left} layers compute in float, expected int8")
    return found


def _zero_point(path: Path, node: Any, constants: dict[str, Array]) -> Array:
    scale = constants.get(node.input[1])
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if scale is None or zero is None:
        raise ValueError(f"{path}: {node.name!r} has no constant scale and zero point")
    if not (np.all(np.isfinite(scale)) and np.all(scale > 0)):
        raise ValueError(f"{path}: {node.name!r} has a scale that is not positive and finite")
    return zero


def _prepared(source: str | Path | Any, folded: Path) -> Any:
    """Constants and batch norms folded, shapes known, every node named; the metadata kept."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source} does not exist, expected a float ONNX model")
        given = onnx.load(str(source))
    else:
        given = source
    plain = folded.with_name("plain.onnx")  # given as an object, its weights would be lost
    onnx.save(given, str(plain))
    # Symbolic shapes would need sympy, and a network of fixed sides has none.
    quant_pre_process(str(plain), str(folded), skip_symbolic_shape=True)
    model = onnx.load(str(folded))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    del model.metadata_props[:]
    model.metadata_props.extend(given.metadata_props)
    return model


def _ranges(model: Any, parts: Sequence[Array], folder: Path, method: str, symmetric: bool) -> Any:
    """Least and largest value of every activation; a part at a time, so that memory stays small."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    name = input_of(model).name
    onnx.save(model, str(folder / "known.onnx"))
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    # With as many bins as levels, its default, entropy has nothing to choose among.
    bins = {"num_bins": 512, "num_quantized_bins": 128} if method == "entropy" else {}
    calibrator = create_calibrator(
        folder / "known.onnx",
        list(KINDS),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=methods[method],
        extra_options={"symmetric": symmetric, **bins},
    )
    for part in parts:
        calibrator.collect_data(_Once({name: np.ascontiguousarray(part)}))
    return calibrator.compute_data()


class _Once:
    """One batch, as ONNX Runtime's calibration asks for it."""

    def __init__(self, feed: dict[str, Array]) -> None:
        self._feeds = iter([feed])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice, which is followed, and its remarks on progress."""
    import onnxruntime

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(3)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        onnxruntime.set_default_logger_severity(2)  # its own default
