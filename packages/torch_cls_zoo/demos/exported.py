"""An exported model as a function of a picture: TorchScript or ONNX, with the facts inside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torch_cls_zoo.dataloader.preprocess import prepare_batch

FACTS = "facts.json"  # as utils/export.py writes it
ONNX_KEY = "smallvision.facts"
NEEDED = ("class_names", "input_size", "mean", "std")


@dataclass(frozen=True)
class Exported:
    """A model that is ready for pictures of any size."""

    class_names: tuple[str, ...]
    image_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    family: str  # softmax, or bce: what turns logits into probabilities
    run: Callable[[np.ndarray], np.ndarray]  # float32 (N, 3, H, W) to logits (N, K)

    def probabilities(self, images: list[np.ndarray]) -> np.ndarray:
        """Probabilities float64 ``(N, K)`` of RGB pictures uint8 ``(h, w, 3)``."""
        batch = prepare_batch(images, self.image_size, mean=self.mean, std=self.std)
        logits = np.asarray(self.run(batch), dtype=np.float64)
        if self.family == "softmax":
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=1, keepdims=True))
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))  # the sigmoid, without overflow

    def classify(self, image: np.ndarray, top: int) -> list[tuple[str, float]]:
        """The ``top`` most probable classes of a picture, with their probabilities."""
        probs = self.probabilities([image])[0]
        order = np.argsort(-probs, kind="stable")[:top]
        return [(self.class_names[i], float(probs[i])) for i in order]


def load_exported(path: str | Path, *, threads: int = 1) -> Exported:
    """Open a file of ``main.py --jit``; ONNX by its ending ``.onnx``, else TorchScript.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no model of this zoo.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    run, text = (_onnx if path.suffix == ".onnx" else _jit)(path, threads)
    try:
        facts: dict[str, Any] = json.loads(text or "")
        missing = [name for name in NEEDED if not facts.get(name)]
    except (ValueError, AttributeError):
        missing = list(NEEDED)
    if missing:
        raise ValueError(f"{path}: does not say its {missing[0]}, expected a file of main.py --jit")
    return Exported(
        class_names=tuple(facts["class_names"]),
        image_size=(int(facts["input_size"][1]), int(facts["input_size"][2])),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        family=str(facts.get("criterion", "softmax")),
        run=run,
    )


def _jit(path: Path, threads: int) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    import warnings

    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # tiny numbers would slow a CPU down
    extra = {FACTS: ""}
    try:
        with warnings.catch_warnings():  # TorchScript warns that it is old
            warnings.simplefilter("ignore")
            model = torch.jit.load(str(path), map_location="cpu", _extra_files=extra).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: no TorchScript file, expected jit_ARCH.pt or .onnx") from error

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(batch)).numpy())

    text = extra[FACTS]
    return run, text.decode() if isinstance(text, bytes) else text


def _onnx(path: Path, threads: int) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise ValueError(f"{path}: no ONNX file ({' '.join(str(error).split())[:120]})") from error
    name = session.get_inputs()[0].name
    text = session.get_modelmeta().custom_metadata_map.get(ONNX_KEY, "")
    return lambda batch: np.asarray(session.run(None, {name: batch})[0]), text
