"""A finished network as the core's predictor: uint8 images in, features of length 1 out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from landmark_distill.config import NetworkConfig, ViewConfig
from landmark_distill.images.views import whole_view
from landmark_distill.model_files import PROJECT, load_model
from shared_core.datasets.reading.loader import usable_cores
from shared_core.deploy.facts import ModelError, ModelFacts, read_facts
from shared_core.deploy.predictor import NetworkPredictor, Predictor, activate, open_model
from shared_core.for_torch.data import Normalizer
from shared_core.for_torch.precision import Precision
from shared_core.runs.command import UsageError

TORCH, PROGRAM = "torch", "program"  # our runtimes beside the core's
PROGRAM_FILE = "model.pt2"


def file_facts(stored: Mapping[str, Any]) -> ModelFacts:
    """What has to be known beside the weights, from the facts of a model file."""
    config, network = stored.get("config") or {}, NetworkConfig.of_file(stored["network"])
    return _facts(
        network,
        ViewConfig(
            network.image_size,
            bgr=bool(stored.get("bgr", False)),
            resize=str(stored.get("resize", "linear")),
            mean=tuple(stored["mean"]),
            std=tuple(stored["std"]),
        ),
        provenance={
            "checkpoint_sha256": stored["sha256"],
            "data": config.get("dataset"),
            "split_hash": stored.get("split_hash"),
            "initial_weights": stored.get("start") or None,
            "teacher": config.get("teacher_init_weights"),
            "seed": config.get("seed"),
            "epoch": stored.get("epoch"),
            "calibration": stored.get("metrics"),
        },
    )


def asked_facts(network: NetworkConfig, views: ViewConfig) -> ModelFacts:
    """Of a network that no file says anything of: what the options say."""
    return _facts(network, views, provenance={})


def _facts(
    network: NetworkConfig, views: ViewConfig, *, provenance: Mapping[str, Any]
) -> ModelFacts:
    size = (network.image_size, network.image_size)
    return ModelFacts(
        project=PROJECT,
        architecture=network.name,
        class_names=(),
        input_size=size,
        view=whole_view(network.image_size, views.resize).settings(),
        mean=views.mean,
        std=views.std,
        task="embed",
        activation="unit",
        bgr=views.bgr,
        provenance=provenance,
        more={"feature_dim": network.feature_dim},
    )


def embedder_of(
    encoder: nn.Module, facts: ModelFacts, precision: Precision, *, name: str
) -> NetworkPredictor:
    """A loaded encoder that sees images as its own run's test does.

    Args:
        precision: says on which device it computes, too.
    """
    encoder = encoder.to(precision.device).eval()
    normalise = Normalizer(facts.mean, facts.std, device=precision.device)

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        pixels = normalise(images)
        if facts.bgr:
            pixels = pixels.flip(1)
        with precision.autocast():
            features = encoder(pixels)
        return activate(features.float().cpu().numpy(), facts.activation, facts.temperature)

    return NetworkPredictor(facts, run, runtime=TORCH, name=name)


def open_checkpoint(
    path: Path, *, runtime: str = "auto", threads: int = 1, device: str = "cpu", amp: str = "fp32"
) -> Predictor | None:
    """An opener for the core: a file of this project by torch; None for anything else."""
    if path.is_dir() or path.suffix in (".onnx", ".xml", ".pt2") or runtime not in ("auto", TORCH):
        return None
    model, stored = load_model(path)
    if stored is None:
        raise ModelError(f"{path} does not say what network it is of: expected a file of this one")
    precision = Precision(choose_device(device), amp)
    return embedder_of(model.encoder, file_facts(stored), precision, name=str(path))


def open_program(
    path: Path, *, runtime: str = "auto", threads: int = 1, device: str = "cpu"
) -> Predictor | None:
    """An opener for the core: the ``torch.export`` program of a model folder."""
    file = path / PROGRAM_FILE if path.is_dir() and runtime == PROGRAM else path
    if file.suffix != ".pt2":
        return None
    facts = read_facts(file.parent)
    return NetworkPredictor(facts, program_run(file), runtime=PROGRAM, name=str(file))


def program_run(file: Path) -> Any:
    """What a program answers: uint8 images ``(N, H, W, 3)`` to features ``(N, D)``."""
    module = torch.export.load(file).module()

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            features: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return features

    return run


def load_embedder(path: str | Path, *, device: str = "cpu", bf16: bool = False) -> Predictor:
    """A model file, a model folder, or one of a folder's files (``.onnx``, ``.pt2``).

    Raises:
        FileNotFoundError, ValueError: neither, damaged, or a model that gives no features.
        UsageError: bfloat16 asked of a model folder.
    """
    path = Path(path)

    def own(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
        amp = "bf16" if bf16 else "fp32"
        return open_checkpoint(path, runtime=runtime, device=device, amp=amp)

    if bf16 and (path.is_dir() or path.suffix in (".onnx", ".pt2")):
        raise UsageError(f"--bf16: {path} computes in the precision that it was exported in")
    found = open_model(path, threads=usable_cores(), device=device, openers=(own, open_program))
    if found.facts.task != "embed":
        raise ModelError(f"{path} names classes, expected a model that gives features")
    return found


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
