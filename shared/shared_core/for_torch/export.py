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
from shared_core.checkpoints.onnx_check import Difference, ExportError, check_onnx

__all__ = ["Difference", "ExportError", "check_onnx", "export_onnx"]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int, int],
    output_names: Sequence[str] = ("logits",),
    opset: int | None = None,
    tolerance: float = 1e-4,
    check_batches: Sequence[int] = (1, 3),
    seed: int = 0,
) -> Difference:
    """Write ``model`` (in eval mode) as one ONNX file with a free batch size, and check it.

    Args:
        model: takes float32 images ``(N, C, H, W)``, gives a tensor or several.
        path: the file, usually ``.onnx``; weights are inside it.
        input_size: ``(C, H, W)``; the input is called ``image``.
        output_names: one for each output.
        opset: version of ONNX's operators; None takes torch's default.
        tolerance: largest relative difference, see :class:`Difference`.
        check_batches: batch sizes to check with; none skips the check.
        seed: of the images that the check uses.

    Returns:
        The difference that was found (zeros without a check).

    Raises:
        ExportError: the difference is above ``tolerance``; no file is left.
        OSError: the file cannot be written; an older one is untouched.

    Needs the packages onnx, onnxscript and (for the check) onnxruntime.
    """
    was_training = model.training
    model.eval()
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = Difference(0.0, 0.0)

    def save(scratch: Path) -> None:
        nonlocal found
        example = torch.zeros(2, *input_size, device=place)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # the exporter is chatty
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                scratch,
                dynamo=True,
                input_names=["image"],
                output_names=list(output_names),
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
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


def _outputs(result: Any) -> list[NDArray[Any]]:
    results = result if isinstance(result, list | tuple) else [result]
    return [one.detach().cpu().numpy() for one in results]
