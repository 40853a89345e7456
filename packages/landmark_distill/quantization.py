"""An int8 version of an exported network by ONNX Runtime, its ranges fixed on calibration images.

Convolutions and linear layers become int8, which is nearly all of the work; attention's products
of activations, norms and the unit length stay float32.

Needs the extra packages onnx and onnxruntime.

Source: Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.checkpoints import atomic_write

KINDS = ("Conv", "Gemm", "MatMul")


def weighted_nodes(path: str | Path) -> list[str]:
    """Names of the nodes with a weight: convolutions and linear layers."""
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in KINDS and len(node.input) > 1 and node.input[1] in weights
    ]


def quantize_student(
    source: str | Path, target: str | Path, batches: Iterable[NDArray[np.float32]]
) -> int:
    """Write the int8 version: weights per output channel, activations per tensor.

    Args:
        source: a float ONNX file whose input is ``image``.
        target: the file to write.
        batches: normalised images ``(N, 3, H, W)``, like those that will come.

    Returns:
        How many layers became int8.

    Raises:
        ValueError: no batches, or no layer that could become int8.
    """
    from onnxruntime import quantization as q

    feeds = [{"image": np.ascontiguousarray(batch)} for batch in batches]
    if not feeds:
        raise ValueError("int8: got no calibration images, expected at least one batch")

    with tempfile.TemporaryDirectory() as folder, _quiet():
        folded = Path(folder) / "folded.onnx"
        q.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
        nodes = weighted_nodes(folded)
        if not nodes:
            raise ValueError(f"{source}: no convolution or linear layer in it")

        def write(scratch: Path) -> None:
            q.quantize_static(
                str(folded),
                str(scratch),
                _Reader(feeds),
                quant_format=q.QuantFormat.QDQ,
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
                per_channel=True,
                nodes_to_quantize=nodes,
                op_types_to_quantize=list(KINDS),
            )

        atomic_write(target, write)
    return len(nodes)


class _Reader:
    """What ONNX Runtime's calibration asks for its inputs, one after the other."""

    def __init__(self, feeds: list[dict[str, NDArray[np.float32]]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Nothing: the inputs fit into memory, so no part of them is asked for."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice, which was followed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
