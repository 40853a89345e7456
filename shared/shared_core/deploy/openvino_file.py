"""OpenVINO, kept from reporting its use, and a model file that it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.deploy.facts import ModelError


@contextmanager
def unreported() -> Iterator[None]:
    """OpenVINO reports each import and conversion over the network, but not from a build server."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def load_openvino(needed_for: str | Path) -> Any:
    """The package.

    Raises:
        ImportError: it is not installed; the message names what it is needed for.
    """
    try:
        with unreported():
            import openvino
    except ImportError as error:
        raise ImportError(
            f"openvino is not installed, expected it for {needed_for}: pip install openvino"
        ) from error
    return openvino


def openvino_run(path: str | Path, *, threads: int = 1) -> Callable[[Any], Any]:
    """A function from a batch to the first output of a model file, on the CPU, float32.

    Args:
        path: an ``.xml`` with its ``.bin``, or an ONNX file.
        threads: 0 is OpenVINO's own choice.

    Raises:
        ImportError: OpenVINO is not installed.
        ModelError: it cannot open the file.
    """
    openvino = load_openvino(path)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: OpenVINO cannot open it: {reason}") from None

    def run(images: Any) -> Any:
        return np.array(compiled(images)[0])  # it writes the next answer into the same memory

    return run
