"""What only this project opens: its ``.pdparams`` files, and Paddle Inference in a model folder.

``open_model`` of the core asks these openers first. Paddle is imported when a model needs it: a
service on ONNX Runtime has none in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared_core.deploy.facts import ONNX, ModelFacts, read_facts
from shared_core.deploy.options import ModelOptions
from shared_core.deploy.predictor import (
    NetworkPredictor,
    Predictor,
    activate,
    open_asked,
    whole_files,
)
from shared_core.for_paddle.inference import check_gpu, import_paddle, paddle_inference
from shared_core.runs import UsageError
from visiondistill_gc.utils.transforms import eval_view

if TYPE_CHECKING:
    from visiondistill_gc.utils.model_files import LoadedModel

PADDLE = "paddle"  # the runtime's name in ``model.json``
PREFIX = "student"  # of its files
CHECKPOINTS = (".pdparams", ".safetensors")


def facts_of(model: LoadedModel) -> ModelFacts:
    """What a model file says, as a model folder says it."""
    known, config = model.facts, model.facts.get("config") or {}
    return ModelFacts(
        project="visiondistill_gc",
        architecture=known["architecture"],
        class_names=model.class_names,
        input_size=(model.input_size, model.input_size),
        view=eval_view(model.input_size).settings(),
        mean=model.mean,
        std=model.std,
        provenance={
            "data": known.get("data"),
            "split_hash": known["split_hash"],
            "teacher": config.get("teacher"),
            "initial_weights": known.get("start") or None,
            "epoch": known["epoch"],
            "metrics": known["metrics"],
            "checkpoint_sha256": known["sha256"],
        },
    )


def predictor_of(model: LoadedModel, *, name: str) -> NetworkPredictor:
    """A loaded model, run by Paddle as it is."""
    facts = facts_of(model)

    def run(images: NDArray[np.uint8]) -> NDArray[np.floating]:
        return activate(model.logits(images), facts.activation)

    return NetworkPredictor(facts, run, runtime="dygraph", name=name)


def _place(device: str) -> str:
    """The device by Paddle's name; a GPU that is not there is refused."""
    kind, _, number = device.partition(":")
    if kind == "auto":
        there = import_paddle().device
        gpus = there.cuda.device_count() if there.is_compiled_with_cuda() else 0
        kind = "gpu" if gpus else "cpu"
    if kind in ("cuda", "gpu"):
        check_gpu()
        return f"gpu:{number or 0}"
    if kind != "cpu":
        raise UsageError(f"--device {device}: expected cpu, cuda, cuda:N or auto")
    return "cpu"


def open_checkpoint(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
    """A model file of this project, run by Paddle as it is.

    Raises:
        UsageError: a runtime, which is for folders, or a GPU that is not there.
        CheckpointError: damaged, hostile, or of another project.
    """
    if path.is_dir() or path.suffix not in CHECKPOINTS:
        return None
    if runtime != "auto":
        raise UsageError(
            f"--runtime {runtime}: {path} is a model file that Paddle runs as it is; expected a "
            "folder that export.py wrote"
        )
    paddle = import_paddle()
    from visiondistill_gc.utils.model_files import load_model

    paddle.set_device(_place(device))
    paddle.base.core.set_num_threads(threads)
    return predictor_of(load_model(path), name=str(path))


def open_paddle(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
    """Paddle Inference in a folder that says it has it, where it is asked for.

    ``auto`` takes it where it is the folder's default, or ONNX Runtime is not installed.
    """
    if not path.is_dir() or runtime not in ("auto", PADDLE) or not (path / "model.json").is_file():
        return None
    facts = read_facts(path)
    usual = facts.default == PADDLE or (facts.default == ONNX and not find_spec("onnxruntime"))
    if PADDLE not in facts.files or (runtime == "auto" and not usual):
        return None
    whole_files(path, facts, PADDLE)
    network = paddle_inference(path / PREFIX, threads=threads, gpu=_place(device) != "cpu")
    return NetworkPredictor(facts, network, runtime=PADDLE, name=str(path))


OPENERS = (open_checkpoint, open_paddle)


def open_checked(
    options: ModelOptions, *, categories: Sequence[str] | None, use_gpu: bool
) -> Predictor:
    """The model that a command names.

    Args:
        categories: the classes that the caller believes it has, in order; None takes the model's.
        use_gpu: on a GPU, whatever the options' device.

    Raises:
        ModelError: nothing that can be opened, or other classes.
        UsageError: a runtime for a model file, or a GPU that is not there.
    """
    if use_gpu:
        options = replace(options, device="cuda")
    predictor = open_asked(options, openers=OPENERS)
    if categories is not None:
        predictor.facts.check_class_names(categories, who="--categories")
    return predictor
