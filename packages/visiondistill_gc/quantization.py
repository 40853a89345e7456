"""int8 versions of exported ONNX files by ONNX Runtime, and what the rounding changed.

Batch norms that follow convolutions are folded into them; then weights become int8 by channel, and
activations uint8 by tensor, in ranges that are fixed on calibration images.

Source: Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.checkpoints import atomic_write

METHODS = ("minmax", "percentile")
INPUT = "image"
BATCH = 16  # most images of a calibration step


def quantize_static(
    source: str | Path,
    target: str | Path,
    images: NDArray[np.float32],
    *,
    method: str = "minmax",
) -> int:
    """Write an int8 version of an exported student.

    Args:
        source: an ONNX file whose input is ``image``.
        target: the file to write.
        images: normalised calibration images float32 ``(M, 3, H, W)``.
        method: how a range is found: ``minmax`` takes all values, ``percentile`` leaves out the
            largest 0.001 %.

    Returns:
        How many operators became int8.

    Raises:
        ValueError: no images, or an unknown method.
    """
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not len(images):
        raise ValueError("int8: no calibration images, expected at least one")
    if method not in METHODS:
        raise ValueError(f"int8: method is {method!r}, expected one of {', '.join(METHODS)}")
    calibrate = {
        "minmax": q.CalibrationMethod.MinMax,
        "percentile": q.CalibrationMethod.Percentile,
    }[method]

    # Equal batches, or ONNX Runtime cannot gather their histograms.
    batch = max(size for size in range(1, BATCH + 1) if len(images) % size == 0)

    def write(scratch: Path) -> None:
        with TemporaryDirectory() as folder:
            folded = Path(folder) / "folded.onnx"
            # Symbolic shapes would need sympy, and a network of fixed sides has none.
            quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
            q.quantize_static(
                str(folded),
                str(scratch),
                _Reader([images[i : i + batch] for i in range(0, len(images), batch)]),
                quant_format=q.QuantFormat.QDQ,
                per_channel=True,
                weight_type=q.QuantType.QInt8,
                activation_type=q.QuantType.QUInt8,
                calibrate_method=calibrate,
            )

    with _quiet():
        atomic_write(target, write)
    graph = onnx.load(str(target)).graph
    made = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    return sum(n.op_type in ("Conv", "Gemm", "MatMul") and n.input[0] in made for n in graph.node)


def compare(
    exact: NDArray[np.floating],
    rounded: NDArray[np.floating],
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """What int8 changed: agreement, relative error of the logits, accuracies; all fractions.

    Args:
        exact, rounded: logits ``(N, K)`` of the same images.
        labels: ``(N,)``; None leaves the accuracies out.
        class_names: for the accuracy of each class.

    Raises:
        ValueError: no images.
    """
    if not len(exact):
        raise ValueError("int8 report: got no images, expected at least one")
    first, second = exact.argmax(axis=1), rounded.argmax(axis=1)
    error = np.linalg.norm(np.subtract(rounded, exact, dtype=np.float64))
    report: dict[str, Any] = {
        "images": len(exact),
        "same_class": float((first == second).mean()),
        "relative_error": float(error / np.linalg.norm(exact)),
    }
    if labels is not None:
        truth = np.asarray(labels)
        report["fp32_accuracy"] = float((first == truth).mean())
        report["int8_accuracy"] = float((second == truth).mean())
        report["by_class"] = {
            name: {
                "images": int((truth == k).sum()),
                "fp32_recall": float((first[truth == k] == k).mean()),
                "int8_recall": float((second[truth == k] == k).mean()),
            }
            for k, name in enumerate(class_names)
            if (truth == k).any()
        }
    return report


class _Reader:
    """What ONNX Runtime's calibration asks for its inputs, one after the other."""

    def __init__(self, batches: Sequence[NDArray[np.float32]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: np.ascontiguousarray(batch)}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Nothing: the inputs fit into memory, so no part of them is asked for."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice to run the pre-processing that was run just before."""
    import onnxruntime

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        logging.disable(before)
        onnxruntime.set_default_logger_severity(2)  # its own default
