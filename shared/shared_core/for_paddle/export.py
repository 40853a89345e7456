"""Export to Paddle's inference format and to ONNX, and a check against the model itself."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import nn

from shared_core.checkpoints import atomic_write
from shared_core.deploy.check import Difference, ExportError, check_onnx

__all__ = ["Difference", "ExportError", "check_onnx", "export_inference", "export_onnx"]


def export_inference(
    model: nn.Layer, prefix: str | Path, *, input_size: tuple[int, int, int]
) -> None:
    """Write ``prefix.json`` and ``prefix.pdiparams`` for Paddle Inference, batch size free.

    Args:
        model: takes float32 images ``(N, C, H, W)``; the first argument of its ``forward`` must be
            called ``self``, Paddle looks at the name.
        prefix: path without suffix.
        input_size: ``(C, H, W)``; the input is called ``image``.
    """
    was_training = model.training
    model.eval()
    spec = paddle.static.InputSpec([None, *input_size], "float32", name="image")
    try:
        paddle.jit.save(model, str(prefix), input_spec=[spec])
    finally:
        if was_training:
            model.train()


def export_onnx(
    model: nn.Layer,
    path: str | Path,
    *,
    input_size: tuple[int, int, int],
    opset: int = 17,
    tolerance: float = 1e-4,
    check_batches: Sequence[int] = (1, 3),
    seed: int = 0,
) -> Difference:
    """Write ``model`` (in eval mode) as one ONNX file with a free batch size, and check it.

    Args:
        model: see :func:`export_inference`.
        path: the file, usually ``.onnx``; weights are inside it.
        input_size: ``(C, H, W)``; the input is called ``image``.
        opset: version of ONNX's operators.
        tolerance: largest relative difference, see :class:`Difference`.
        check_batches: batch sizes to check with; none skips the check.
        seed: of the images that the check uses.

    Returns:
        The difference that was found (zeros without a check).

    Raises:
        ExportError: Paddle2ONNX cannot convert the model, or the difference is above
            ``tolerance``; no file is left.
        OSError: the file cannot be written; an older one is untouched.

    Needs the packages paddle2onnx, onnx and (for the check) onnxruntime.
    """
    import paddle2onnx

    found = Difference(0.0, 0.0)

    def save(scratch: Path) -> None:
        nonlocal found
        with TemporaryDirectory() as folder:
            prefix = Path(folder) / "model"
            export_inference(model, prefix, input_size=input_size)
            # The default optimize_tool, polygraphy, runs `pip install` by itself. Without
            # save_file the bytes come back before any such tool is called.
            content = paddle2onnx.export(
                f"{prefix}.json",
                f"{prefix}.pdiparams",
                save_file=None,
                opset_version=opset,
                optimize_tool="onnxoptimizer",
                verbose=False,
            )
        scratch.write_bytes(content)
        generator = np.random.default_rng(seed)
        batches = [
            generator.standard_normal((n, *input_size)).astype(np.float32) for n in check_batches
        ]
        if batches:
            expected = [_eval(model, batch) for batch in batches]
            found = check_onnx(scratch, batches, expected, tolerance=tolerance)

    try:
        atomic_write(path, save)
    except UnboundLocalError as error:  # how Paddle2ONNX ends after it printed why it failed
        raise ExportError(f"{path}: Paddle2ONNX could not convert the model") from error
    return found


def _eval(model: nn.Layer, batch: NDArray[Any]) -> list[NDArray[Any]]:
    was_training = model.training
    model.eval()
    with paddle.no_grad():
        result = model(paddle.to_tensor(batch))
    if was_training:
        model.train()
    results = result if isinstance(result, list | tuple) else [result]
    return [one.numpy() for one in results]
