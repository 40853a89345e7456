"""Int8 by NNCF for OpenVINO: convert, calibrate, save; needs the extra ``openvino``.

NNCF puts the fake quantisers into OpenVINO's graph and chooses them for its kernels (unsigned
inputs with offsets among them). For a graph with zero points of 0 see ``ort_int8``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mpkd.deploy.openvino_net import INSTALL, convert_openvino, load_openvino, unreported


def _libraries() -> tuple[Any, Any]:
    """openvino and nncf.

    Raises:
        ValueError: they are not installed.
    """
    os.environ.setdefault("NNCF_CI", "1")  # NNCF asks this name before it reports its use
    try:
        openvino = load_openvino()
        with unreported():
            import nncf
    except ImportError as error:
        name = error.name or "openvino"
        raise ValueError(
            f"the package {name} is not installed, expected it for int8 by NNCF: {INSTALL}"
        ) from None
    return openvino, nncf


def nncf_int8(
    net: nn.Module,
    target: str | Path,
    calibration: Tensor,
    *,
    batch_size: int = 32,
) -> Path:
    """Quantize a float network to int8 and write ``target`` (``.xml``) with its ``.bin``.

    Args:
        net: plain, in evaluation mode, on the CPU.
        target: the file; its weights lie beside it.
        calibration: normalised images float32 ``(N, 3, H, W)``; labels are not needed.
        batch_size: images at once.

    Returns:
        ``target``.

    Raises:
        ValueError: the extra is not installed, no images, or another ending than ``.xml``.
    """
    target = Path(target)
    if target.suffix != ".xml":
        raise ValueError(f"{target}: expected a name that ends in .xml")
    if calibration.dim() != 4 or not len(calibration):
        raise ValueError(
            f"calibration images have shape {tuple(calibration.shape)}, expected (N, 3, H, W)"
        )
    openvino, nncf = _libraries()
    model = convert_openvino(net, calibration.shape[-1])
    images = [batch.numpy() for batch in calibration.float().cpu().split(batch_size)]
    quantized = nncf.quantize(
        model, nncf.Dataset(images), subset_size=len(images), fast_bias_correction=True
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        written = Path(scratch) / target.name
        openvino.save_model(quantized, str(written), compress_to_fp16=False)
        # The weights first: the .xml never stands there without them.
        os.replace(written.with_suffix(".bin"), target.with_suffix(".bin"))
        os.replace(written, target)
    return target


def quantised_operations(path: str | Path) -> dict[str, int]:
    """Number of nodes by type in an OpenVINO file; ``FakeQuantize`` are the quantisers."""
    openvino, _ = _libraries()
    counts: dict[str, int] = {}
    for node in openvino.Core().read_model(str(path)).get_ops():
        counts[node.get_type_name()] = counts.get(node.get_type_name(), 0) + 1
    return counts


def run_openvino(
    path: str | Path, images: NDArray[np.float32], *, batch_size: int = 64, threads: int = 0
) -> NDArray[np.float32]:
    """Logits ``(N, C)`` of an OpenVINO file for images ``(N, 3, H, W)``.

    Args:
        threads: of the runtime; 0 = its own choice.
    """
    openvino, _ = _libraries()
    settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    parts = [
        compiled(images[i : i + batch_size].astype(np.float32))[0]
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)
