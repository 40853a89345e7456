"""What only this project opens: its checkpoints, packed weights, OpenVINO's int8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpkd.dataset.views import eval_view
from mpkd.utils.common import PROJECT, load_net
from shared_core.deploy.facts import FACTS_FILE, ModelFacts, read_facts
from shared_core.deploy.openvino_file import openvino_run
from shared_core.deploy.predictor import NetworkPredictor, Predictor, Run, logits_to_run
from shared_core.runs import UsageError

TORCH, PACKED, OPENVINO_INT8 = "torch", "packed", "openvino-int8"
CHECKPOINTS = (".pth", ".pt", ".safetensors")


def facts_of(known: Mapping[str, Any]) -> ModelFacts:
    """What a checkpoint of this project says, as a model folder says it."""
    size, config = int(known["input_size"][1]), known.get("config") or {}
    quantization = known.get("quantization")
    bits = {} if not quantization else {
        "w_bits": quantization["w_bits"], "a_bits": quantization["a_bits"],
        "w_levels": quantization.get("w_levels", {}),
    }  # fmt: skip
    return ModelFacts(
        project=PROJECT,
        architecture=known["architecture"],
        class_names=tuple(known["class_names"]),
        input_size=(size, size),
        view=eval_view(size, whole=known["net"].get("whole", False)).settings(),
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        provenance={
            "data": config.get("dataset.name"),
            "split_hash": known.get("split_hash"),
            "teacher": config.get("model.teacher_model"),
            "learned_from": config.get("distillation.mode"),
            "quantization": config.get("quantization.method") if bits else None,
            "epoch": known.get("epoch"),
            "checkpoint_sha256": known.get("sha256"),
        },
        more=bits,
    )


def torch_run(facts: ModelFacts, net: nn.Module, device: str | torch.device = "cpu") -> Run:
    """uint8 views ``(N, H, W, 3)`` to probabilities ``(N, C)``, computed by torch."""
    place = torch.device(device)
    net = net.to(place).eval()

    @torch.no_grad()
    def logits(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return net(torch.from_numpy(images).to(place)).float().cpu().numpy()

    return logits_to_run(facts, logits)


def open_checkpoint(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
    """A checkpoint of this project, packed ones too, run by torch."""
    if path.is_dir() or path.suffix not in CHECKPOINTS:
        return None
    if runtime not in ("auto", TORCH):
        raise UsageError(f"{path.name} is a file for torch, --runtime says {runtime}")
    net, known = load_net(path)
    facts = facts_of(known)
    place = "cpu" if device == "auto" else device
    torch.set_num_threads(threads or torch.get_num_threads())
    return NetworkPredictor(facts, torch_run(facts, net, place), runtime=TORCH, name=str(path))


def open_own_form(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
    """A form of a model folder that the core does not know, where it is asked for."""
    if not path.is_dir() or runtime not in (PACKED, OPENVINO_INT8):
        return None
    if not (path / FACTS_FILE).is_file():
        return None
    facts = read_facts(path)
    if runtime not in facts.files:
        return None
    file = path / facts.files[runtime][0]
    if runtime == PACKED:
        return open_checkpoint(file, runtime="auto", threads=threads, device=device)
    if device not in ("cpu", "auto"):
        raise UsageError(f"--device {device}: OpenVINO runs on the CPU here, expected cpu")
    run = openvino_run(file, threads=threads)
    return NetworkPredictor(facts, run, runtime=runtime, name=str(path))


OPENERS = (open_checkpoint, open_own_form)
