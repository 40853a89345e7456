"""One door to torch, ONNX Runtime and OpenVINO: uint8 images in, probabilities out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpkd.dataset.views import open_image
from mpkd.deploy.export import ABOUT, FP32, IR
from mpkd.deploy.onnx_session import onnx_session
from mpkd.deploy.openvino_net import openvino_model
from mpkd.utils.common import load_net
from shared_core.for_torch.data import Normalizer
from shared_core.metrics import softmax

BACKENDS = ("auto", "torch", "onnxruntime", "openvino")
_BY_SUFFIX = {".onnx": "onnxruntime", ".xml": "openvino"}


@dataclass(frozen=True)
class Classifier:
    """A model that is ready.

    Attributes:
        backend: what computes.
        classes: names in the order of the probabilities.
        image_size: side in pixels.
        logits: normalised images float32 ``(N, 3, S, S)`` to logits ``(N, C)``.
        normalizer: that of validation.
    """

    backend: str
    classes: tuple[str, ...]
    image_size: int
    logits: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    normalizer: Normalizer

    def open(self, source: str | bytes, *, name: str = "") -> npt.NDArray[np.uint8]:
        """An image file as validation sees it, uint8 ``(S, S, 3)``.

        Raises:
            FileNotFoundError, DecodeError: no such file, or no image.
        """
        return open_image(source, image_size=self.image_size, name=name)

    def probabilities(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
        """Class probabilities ``(N, C)`` of images from :meth:`open`."""
        batch = self.normalizer(np.stack(images))
        return softmax(self.logits(batch.cpu().contiguous().numpy()))

    def answer(self, probabilities: npt.NDArray[np.float64], *, top: int = 3) -> dict[str, Any]:
        """One image's answer as plain JSON: class, probability, the ``top`` best."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        best = [{"class": self.classes[n], "probability": float(probabilities[n])} for n in order]
        return {**best[0], "top": best}


def load_classifier(
    path: str | Path, *, backend: str = "auto", device: str = "cpu", threads: int = 1
) -> Classifier:
    """A ``.pth`` of this project, an exported ``.onnx`` or ``.xml``, or a run's ``export`` folder.

    Args:
        backend: ``auto`` takes what the file is for; a folder's with ``auto`` is ONNX Runtime.

    Raises:
        FileNotFoundError: no such file, or no description beside an exported one.
        ValueError: a backend that the file is not for.
    """
    path = Path(path)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if path.is_dir():
        path = path / (IR if backend == "openvino" else FP32)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such model")
    kind = _BY_SUFFIX.get(path.suffix, "torch")
    if backend not in ("auto", kind):
        raise ValueError(f"{path.name} is a file for {kind}, --backend says {backend}")
    if kind == "torch":
        return _torch(path, device)
    if device not in ("auto", "cpu"):
        raise ValueError(f"device {device!r}: {kind} runs on the CPU here, expected cpu")
    about_file = path.parent / ABOUT
    if not about_file.is_file():
        raise FileNotFoundError(f"{about_file}: missing, expected it beside {path.name}")
    about = json.loads(about_file.read_text(encoding="utf-8"))
    run = _onnx(path, threads) if kind == "onnxruntime" else _openvino(path, threads)
    return Classifier(
        kind, tuple(about["class_names"]), int(about["input_size"][1]), run,
        Normalizer(tuple(about["mean"]), tuple(about["std"])),
    )  # fmt: skip


def _torch(path: Path, device: str) -> Classifier:
    net, facts = load_net(path)
    place = torch.device("cpu" if device == "auto" else device)
    net.to(place)

    @torch.no_grad()
    def logits(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return net(torch.from_numpy(images).to(place)).float().cpu().numpy()

    return Classifier(
        "torch", tuple(facts["class_names"]), int(facts["input_size"][1]), logits,
        Normalizer(tuple(facts["mean"]), tuple(facts["std"])),
    )  # fmt: skip


def _onnx(path: Path, threads: int) -> Callable[[Any], Any]:
    session = onnx_session(path, threads=threads)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(path: Path, threads: int) -> Callable[[Any], Any]:
    compiled = openvino_model(path, threads=threads)
    return lambda images: compiled(images)[compiled.output(0)]
