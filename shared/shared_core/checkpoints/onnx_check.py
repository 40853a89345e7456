"""Does an exported ONNX file give the numbers of the model it was made from?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ExportError(ValueError):
    """An exported model does not give the numbers of the model it was made from."""


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from its source, over all outputs of the check."""

    max_abs: float
    max_rel: float  # max_abs divided by the largest absolute value that was expected


def check_onnx(
    path: str | Path,
    batches: Sequence[NDArray[Any]],
    expected: Sequence[Sequence[NDArray[Any]]],
    *,
    tolerance: float = 1e-4,
) -> Difference:
    """Run an ONNX file and compare all its outputs.

    Args:
        path: the file; it has one input.
        batches: inputs.
        expected: for each batch, the outputs in the file's order.
        tolerance: largest relative difference.

    Raises:
        ExportError: above ``tolerance``, not finite, or another number or shape of outputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    max_abs = max_rel = 0.0
    for batch, wanted in zip(batches, expected, strict=True):
        got = session.run(None, {name: batch})
        shapes = [tuple(g.shape) for g in got], [tuple(w.shape) for w in wanted]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{path}: outputs have shapes {shapes[0]}, expected {shapes[1]}")
        for g, w in zip(got, wanted, strict=True):
            difference = float(np.abs(np.subtract(g, w, dtype=np.float64)).max())
            size = float(np.abs(w).max())
            relative = difference / size if size > 0 else difference
            max_abs = float(np.maximum(max_abs, difference))  # unlike max, it keeps a nan
            max_rel = float(np.maximum(max_rel, relative))
            if not max_rel <= tolerance:  # also when it is not a number
                raise ExportError(
                    f"{path}: ONNX Runtime differs by {max_rel:.2e} relative "
                    f"({max_abs:.2e} absolute), expected at most {tolerance:.0e}"
                )
    return Difference(max_abs, max_rel)
