"""A torch network computed by OpenVINO on the CPU, in the place of the network itself."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mpkd.utils.config import INSTALL_OPENVINO
from shared_core.deploy.openvino_file import load_openvino, unreported


def convert_openvino(net: nn.Module, image_size: int) -> Any:
    """An OpenVINO model of ``net``, float32, any batch size.

    Args:
        net: on the CPU; put into evaluation mode.
        image_size: side in pixels.

    Raises:
        ImportError: the package openvino is not installed.
    """
    openvino = load_openvino(f"this network ({INSTALL_OPENVINO})")
    example = torch.zeros(1, 3, image_size, image_size)
    with unreported(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the trace that the converter takes
        return openvino.convert_model(
            net.eval(), example_input=example, input=[-1, 3, image_size, image_size]
        )


class OpenVinoNet(nn.Module):
    """Answers like ``net`` in evaluation mode, without gradients; later changes do not reach it.

    It has no parameters of its own. The same number of threads gives the same bits.

    Args:
        net: on the CPU.
        image_size: side in pixels.
        threads: of the runtime.
        precision: ``f32``, or ``bf16`` where the CPU has it (elsewhere that computes in f32).

    Raises:
        ImportError: the package openvino is not installed.
    """

    def __init__(
        self, net: nn.Module, *, image_size: int, threads: int, precision: str = "f32"
    ) -> None:
        super().__init__()
        model = convert_openvino(net, image_size)
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        core = load_openvino("this network").Core()
        self._compiled = core.compile_model(model, "CPU", options)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 ``(N, C)`` of images ``(N, 3, S, S)``."""
        batch = images.detach().float().contiguous().numpy()
        # The runtime writes its next answer into the same memory.
        return torch.from_numpy(self._compiled(batch)[0].copy())
