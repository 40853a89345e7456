"""int8 versions of exported ONNX files, and what the rounding changed.

Only the linear layers inside the blocks become int8: they are nearly all of the MACs, and the
matrices of the filters lose too much.

Needs the extra packages onnx and onnxruntime.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gfnet_dynn.onnx_chain import input_name, session
from shared_core.checkpoints import atomic_write

QUANTIZATIONS = ("static", "dynamic")


def linear_nodes(path: str | Path) -> list[str]:
    """Names of the MatMul nodes of a file whose right side is a weight: its linear layers.

    The matrices of the filters stand on the left and stay float32.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


def quantize_file(
    source: str | Path,
    target: str | Path,
    *,
    method: str = "static",
    calibration: Iterable[dict[str, np.ndarray]] = (),
) -> int:
    """Write an int8 version of an ONNX file: weights per channel, activations per tensor.

    Args:
        method: ``static`` fixes the ranges of activations on ``calibration`` inputs; ``dynamic``
            finds them anew for each batch.
        calibration: inputs by name, a few batches.

    Returns:
        How many linear layers became int8.

    Source: Jacob et al. 2018, arXiv:1712.05877.
    """
    import onnx
    from onnxruntime import quantization as q

    if method not in QUANTIZATIONS:
        raise ValueError(f"int8: got {method!r}, expected one of {QUANTIZATIONS}")
    nodes = linear_nodes(source)
    options = {
        "nodes_to_quantize": nodes,
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "weight_type": q.QuantType.QInt8,
    }
    model = onnx.load(str(source))
    del model.graph.value_info[:]  # quantize_dynamic transposes weights, but not their entries here

    def write(scratch: Path) -> None:
        if method == "dynamic":
            q.quantize_dynamic(model, str(scratch), **options)
            return
        q.quantize_static(
            model,
            str(scratch),
            _Reader(calibration),
            quant_format=q.QuantFormat.QDQ,
            activation_type=q.QuantType.QUInt8,
            **options,
        )

    with _quiet():
        atomic_write(target, write)
    return len(nodes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice to run its pre-processing, which changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader:
    """What ONNX Runtime's calibration asks for its inputs, one after the other."""

    def __init__(self, inputs: Iterable[dict[str, np.ndarray]]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Nothing: the inputs fit into memory, so no part of them is asked for."""


def quantize_segments(
    folder: Path, names: Sequence[str], *, method: str, images: np.ndarray | None, batch: int = 16
) -> None:
    """Quantize the segments of a chain in place; each is calibrated on the float chain's tokens."""
    parts = [] if images is None else [images[i : i + batch] for i in range(0, len(images), batch)]
    values = [np.ascontiguousarray(part, dtype=np.float32) for part in parts]
    for index, name in enumerate(names):
        inputs = [{input_name(index): value} for value in values]
        if index + 1 < len(names):
            run = session(folder / name)
            values = [run.run(["tokens"], feed)[0] for feed in inputs]
        quantize_file(folder / name, folder / name, method=method, calibration=inputs)


def quantize_student(
    source: str | Path, target: str | Path, *, images: np.ndarray, method: str = "static"
) -> dict:
    """Quantize an exported plain network; returns :func:`accuracy_report` on ``images``.

    Give :func:`accuracy_report` held-out images and labels for a number to publish.
    """
    batches = [images[i : i + 16] for i in range(0, len(images), 16)]
    count = quantize_file(
        source, target, method=method, calibration=[{"image": b} for b in batches]
    )
    return {"quantized_layers": count, **accuracy_report(source, target, images)}


def accuracy_report(
    float_path: str | Path,
    int8_path: str | Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
) -> dict:
    """What quantization changed: agreement, error, accuracies (fractions), file sizes (bytes).

    Args:
        images: normalised, float32 ``(N, 3, H, W)``.
        labels: int ``(N,)``; without them no accuracies.
    """
    if not len(images):
        raise ValueError("images: got none, expected at least one")
    outputs = []
    for path in (float_path, int8_path):
        run = session(path)
        outputs.append(
            np.concatenate(
                [run.run(None, {"image": images[i : i + 16]})[0] for i in range(0, len(images), 16)]
            )
        )
    exact, rounded = outputs
    report = {
        "images": len(images),
        "top1_agreement": float((exact.argmax(1) == rounded.argmax(1)).mean()),
        "relative_error": float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)),
        "float_bytes": Path(float_path).stat().st_size,
        "int8_bytes": Path(int8_path).stat().st_size,
    }
    if labels is not None:
        report["float_accuracy"] = float((exact.argmax(1) == labels).mean())
        report["int8_accuracy"] = float((rounded.argmax(1) == labels).mean())
    return report
