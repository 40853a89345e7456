"""Export to ONNX, and a check that ONNX Runtime gives the numbers that torch gives."""

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared_core.checkpoints import atomic_write
from shared_core.deploy.check import Difference, ExportError, check_onnx

__all__ = ["Difference", "ExportError", "check_onnx", "export_onnx"]

LEAST_OPSET = 13  # in which int8 layers have a scale for each channel
_NEWER = 18  # from here on torch's newer exporter writes the opset that it is asked for


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, ...],
    input_name: str = "image",
    output_names: Sequence[str] = ("logits",),
    opset: int | None = None,
    tolerance: float = 1e-4,
    check_batches: Sequence[int] = (1, 3),
    seed: int = 0,
) -> Difference:
    """Write ``model`` (in eval mode) as one float ONNX file with a free batch size, and check it.

    Args:
        model: takes float32 ``(N, *input_size)``, gives a tensor or several.
        path: the file, usually ``.onnx``; weights are inside it.
        input_size: of one sample, usually ``(C, H, W)``; what a later segment of a chain takes has
            another form.
        input_name: of the input.
        output_names: one for each output.
        opset: version of ONNX's operators, 13 or more; None takes torch's default.
        tolerance: largest relative difference, see :class:`Difference`.
        check_batches: batch sizes to check with; none skips the check.
        seed: of the inputs that the check uses.

    Returns:
        The difference that was found (zeros without a check).

    Raises:
        ExportError: the difference is above ``tolerance``; no file is left.
        ValueError: an opset below 13.
        OSError: the file cannot be written; an older one is untouched.

    Needs the packages onnx, onnxscript and (for the check) onnxruntime.
    """
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f"opset is {opset}, expected {LEAST_OPSET} or more")
    was_training = model.training
    model.eval()
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    names = {"input_names": [input_name], "output_names": list(output_names)}
    found = Difference(0.0, 0.0)

    def save(scratch: Path) -> None:
        nonlocal found
        example = torch.zeros(2, *input_size, device=place)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # the exporter is chatty
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (example,), scratch, opset_version=opset, **names, **_how(opset, names)
            )
        generator = np.random.default_rng(seed)
        batches = [
            generator.standard_normal((n, *input_size)).astype(np.float32) for n in check_batches
        ]
        if batches:
            with torch.no_grad():
                expected = [_outputs(model(torch.from_numpy(b).to(place))) for b in batches]
            found = check_onnx(scratch, batches, expected, tolerance=tolerance)

    try:
        atomic_write(path, save)
    finally:
        model.train(was_training)
    return found


def _how(opset: int | None, names: dict[str, list[str]]) -> dict[str, Any]:
    """The exporter that writes this opset: the newer one would write its own least instead."""
    if opset is not None and opset < _NEWER:
        free = {name: {0: "batch"} for group in names.values() for name in group}
        return {"dynamo": False, "dynamic_axes": free}
    return {
        "dynamo": True,
        "dynamic_shapes": ({0: torch.export.Dim("batch")},),
        "external_data": False,
        "verbose": False,
    }


def _outputs(result: Any) -> list[NDArray[Any]]:
    results = result if isinstance(result, list | tuple) else [result]
    return [one.detach().cpu().numpy() for one in results]
