"""A torch network computed by OpenVINO on the CPU, in the place of the network itself."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install './packages/mpkd[openvino]'"


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


def load_openvino() -> Any:
    """The package; it is kept from reporting its use.

    Raises:
        ImportError: it is not installed.
    """
    try:
        with unreported():
            import openvino
    except ImportError as error:
        raise ImportError(f"openvino is not installed: {INSTALL}") from error
    return openvino


def convert_openvino(net: nn.Module, image_size: int) -> Any:
    """An OpenVINO model of ``net``, float32, any batch size.

    Args:
        net: on the CPU; put into evaluation mode.
        image_size: side in pixels.

    Raises:
        ImportError: the package openvino is not installed.
    """
    openvino = load_openvino()
    example = torch.zeros(1, 3, image_size, image_size)
    with unreported(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the trace that the converter takes
        return openvino.convert_model(
            net.eval(), example_input=example, input=[-1, 3, image_size, image_size]
        )


def openvino_model(source: str | Path | Any, *, threads: int = 1, precision: str = "f32") -> Any:
    """A compiled model for the CPU; int8 stays where the file says so.

    Args:
        source: a ``.xml`` file, or what :func:`convert_openvino` gives.
        threads: of the runtime.
        precision: ``f32``, or ``bf16`` where the CPU has it (elsewhere that computes in f32).

    Raises:
        ImportError: the package openvino is not installed.
    """
    openvino = load_openvino()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    model = str(source) if isinstance(source, str | Path) else source
    return openvino.Core().compile_model(model, "CPU", options)


class OpenVinoNet(nn.Module):
    """Answers like ``net`` in evaluation mode, without gradients; later changes do not reach it.

    It has no parameters of its own. The same number of threads gives the same bits.

    Args:
        net: on the CPU.
        image_size: side in pixels.
        threads: of the runtime.
        precision: see :func:`openvino_model`.

    Raises:
        ImportError: the package openvino is not installed.
    """

    def __init__(
        self, net: nn.Module, *, image_size: int, threads: int, precision: str = "f32"
    ) -> None:
        super().__init__()
        model = convert_openvino(net, image_size)
        self._compiled = openvino_model(model, threads=threads, precision=precision)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 ``(N, C)`` of images ``(N, 3, S, S)``."""
        batch = images.detach().float().contiguous().numpy()
        # The runtime writes its next answer into the same memory.
        return torch.from_numpy(self._compiled(batch)[0].copy())
