"""A finished network in its two forms: float ONNX, and a program of Paddle Inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn
from paddle.nn import functional as F  # noqa: N812

from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.write import Form
from shared_core.for_paddle.export import export_onnx
from shared_core.for_paddle.inference import paddle_inference
from visiondistill_gc.deploy.openers import PREFIX


class Answering(nn.Layer):
    """A network with its normalisation and softmax, so that any program can ask it.

    Args:
        net: normalised images float32 ``(N, 3, H, W)`` to logits ``(N, K)``.
        facts: say how images are normalised.
    """

    def __init__(self, net: nn.Layer, facts: ModelFacts) -> None:
        super().__init__()
        scale, shift = facts.scale_and_shift()
        self.net, self.temperature = net, facts.temperature
        self.register_buffer("scale", paddle.to_tensor(scale.reshape(1, 3, 1, 1)))
        self.register_buffer("shift", paddle.to_tensor(shift.reshape(1, 3, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities ``(N, K)`` of uint8 RGB images ``(N, H, W, 3)``."""
        pixels = images.transpose([0, 3, 1, 2]).astype("float32") * self.scale + self.shift
        return F.softmax(self.net(pixels) / self.temperature, axis=1)


def paddle_form(net: nn.Layer, facts: ModelFacts) -> Form:
    """``student.json`` and ``student.pdiparams``: uint8 ``images`` in, probabilities out."""
    answering = Answering(net, facts)
    answering.eval()
    spec = paddle.static.InputSpec([None, *facts.input_size, 3], "uint8", name="images")

    def write(folder: Path) -> Sequence[str]:
        paddle.jit.save(answering, str(folder / PREFIX), input_spec=[spec])
        return [f"{PREFIX}.json", f"{PREFIX}.pdiparams"]

    def opened(folder: Path) -> Any:
        return paddle_inference(folder / PREFIX)

    return Form(write, opened)


def onnx_source(net: nn.Layer, facts: ModelFacts, folder: Path, *, opset: int) -> Path:
    """The network alone as float ONNX, which the core wraps and checks."""
    path = folder / "float.onnx"
    shape = (3, *facts.input_size)
    export_onnx(net, path, input_size=shape, opset=opset, check_batches=())
    return path


def macs_of(net: nn.Layer, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image in the convolutions and linear layers.

    Args:
        size: height and width of the image in pixels.
    """
    found: list[int] = []

    def conv(layer: nn.Layer, _: Any, output: Tensor) -> None:
        found.append(int(np.prod(layer.weight.shape[1:])) * int(np.prod(output.shape[1:])))

    def linear(layer: nn.Layer, _: Any, output: Tensor) -> None:
        found.append(layer.weight.shape[0] * int(np.prod(output.shape[1:])))

    kinds = ((nn.Conv2D, conv), (nn.Linear, linear))
    hooks = [
        layer.register_forward_post_hook(count)
        for kind, count in kinds
        for layer in net.sublayers()
        if isinstance(layer, kind)
    ]
    images: NDArray[np.float32] = np.zeros((1, 3, *size), np.float32)
    try:
        with paddle.no_grad():
            net(paddle.to_tensor(images))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found)
