"""A finished network that turns images into unit-length features: a model file, or an export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from landmark_distill.features import Sight, unit_rows
from landmark_distill.model_files import load_model
from shared_core.datasets.finding.scan import is_image_name
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD

DESCRIPTION_FILE = "model.json"
ONNX_FILE, INT8_FILE, PROGRAM_FILE = "student.onnx", "student_int8.onnx", "student.pt2"
FORMAT = "landmark_distill.student/1"


class Embedder(Protocol):
    """A network that can be asked for features."""

    architecture: str
    sight: Sight
    width: int
    weights: str  # sha256
    device: torch.device

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Unit-length features ``(N, width)`` of normalised images ``(N, 3, H, W)``."""
        ...


class TorchEmbedder:
    """A model file, run by torch.

    Raises:
        ValueError, FileNotFoundError: no model file of this project.
    """

    def __init__(
        self, path: str | Path, *, device: torch.device | str = "cpu", bf16: bool = False
    ) -> None:
        model, facts = load_model(path)
        if facts is None:
            raise ValueError(f"{path} does not say what network it is of")
        self.device = torch.device(device)
        self.encoder: nn.Module = model.encoder.eval().to(self.device)
        self.architecture = str(facts["architecture"])
        self.width = model.feature_dim
        self.weights = str(facts["sha256"])
        self.bf16 = bf16
        self.sight = Sight(
            size=int(facts["input_size"][1]),
            bgr=bool(facts.get("bgr", False)),
            resize=str(facts.get("resize", "linear")),
            mean=tuple(facts["mean"] or IMAGENET_MEAN),
            std=tuple(facts["std"] or IMAGENET_STD),
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """See :class:`Embedder`."""
        kind = self.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.bf16):
            features = self.encoder(images)
        return unit_rows(features.float().cpu().numpy()).astype(np.float32)


class ExportedEmbedder:
    """A folder that ``export_model.py`` wrote, on a CPU; ``file`` names another of its networks."""

    def __init__(self, folder: str | Path, *, file: str | None = None, threads: int = 0) -> None:
        folder = Path(folder)
        path = folder / DESCRIPTION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {DESCRIPTION_FILE}: expected a folder that export_model.py "
                "wrote, or a model file"
            )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']!r}, expected {FORMAT!r}")
            self.architecture = str(facts["architecture"])
            self.width = int(facts["feature_dim"])
            self.weights = str(facts["source"]["sha256"])
            self.sight = Sight(**{**facts["sight"], "mean": tuple(facts["sight"]["mean"]),
                                  "std": tuple(facts["sight"]["std"])})  # fmt: skip
            network = folder / str(file or facts["file"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} describes no model: {error}") from None
        if not network.is_file():
            raise FileNotFoundError(f"{network} is missing, expected the network of {path}")
        if network.name == INT8_FILE:  # other numbers, so other features
            self.weights += "-int8"
        self.device = torch.device("cpu")
        self._run = _program(network) if network.suffix == ".pt2" else _onnx(network, threads)

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """See :class:`Embedder`."""
        return unit_rows(self._run(images)).astype(np.float32)


def _program(path: Path) -> Callable[[Tensor], NDArray[Any]]:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> NDArray[Any]:
        with torch.inference_mode():
            return module(images).numpy()

    return run


def _onnx(path: Path, threads: int) -> Callable[[Tensor], NDArray[Any]]:
    """A session of ONNX Runtime; 0 threads is its own choice."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            f"onnxruntime is not installed: expected it for {path}; "
            "pip install './packages/landmark_distill[export]'"
        ) from None

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images.contiguous().numpy()})[0]


def load_embedder(
    path: str | Path, *, device: torch.device | str = "cpu", bf16: bool = False
) -> Embedder:
    """A model file, an exported folder, or one network in such a folder (``.onnx``, ``.pt2``).

    Raises:
        FileNotFoundError, ValueError: neither; or a GPU or bf16 asked of an export.
    """
    path = Path(path)
    inside = path.suffix in (".onnx", ".pt2")
    if path.is_dir() or inside:
        if torch.device(device).type != "cpu" or bf16:
            raise ValueError(f"{path} is an export, which runs on the CPU in its own precision")
        folder, file = (path.parent, path.name) if inside else (path, None)
        return ExportedEmbedder(folder, file=file, threads=torch.get_num_threads())
    return TorchEmbedder(path, device=device, bf16=bf16)


def choose_device(name: str) -> torch.device:
    """``auto``, or a device of torch that is there.

    Raises:
        ValueError: an unknown or absent device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; expected auto, cpu or a GPU") from None
    return device


def list_images(paths: Iterable[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Image files at and below ``paths``, each once, folders sorted as bytes.

    A file that is named itself is taken whatever its extension is; hidden folders are not.

    Returns:
        The files, and what could not be listed with the reason.
    """
    files: dict[Path, None] = {}
    bad: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            found = []
            for top, folders, names in os.walk(path):
                folders[:] = sorted((f for f in folders if f[:1] != "."), key=os.fsencode)
                inside = sorted((n for n in names if is_image_name(n)), key=os.fsencode)
                found += [Path(top) / name for name in inside]
            if not found:
                bad.append((path, "no image in this folder"))
            files.update(dict.fromkeys(found))
        elif path.exists():
            files[path] = None
        else:
            bad.append((path, "no such file or folder"))
    return list(files), bad
