"""What only the zoo can open: its checkpoints, and the files of ``main.py --jit``.

Each is asked by the core's :func:`shared_core.deploy.predictor.open_model` before the core looks
itself, and says None to what it does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shared_core.deploy.facts import METADATA_KEY, ModelError, ModelFacts
from shared_core.deploy.predictor import NetworkPredictor, Predictor, logits_to_run
from shared_core.deploy.session import open_session
from shared_core.runs import UsageError
from torch_cls_zoo.applications.model_facts import FACTS, facts_from_file, facts_of_checkpoint

CHECKPOINT, TORCHSCRIPT = "checkpoint", "torchscript"
ENDINGS = {".pth": CHECKPOINT, ".pt": TORCHSCRIPT}


def open_torch(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
    """A ``.pth`` of a training, or a ``.pt`` (TorchScript).

    A ``.pt2`` of torch.export is not opened: reading one may run code that is in it.

    Raises:
        UsageError: another runtime.
        ModelError: no model of this zoo.
    """
    kind = ENDINGS.get(path.suffix)
    if kind is None or path.is_dir():
        return None
    if runtime not in ("auto", kind):
        raise UsageError(f"--runtime {runtime}: {path} is a file for {kind}")
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # tiny numbers would slow a CPU down
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    model, facts = (_checkpoint if kind == CHECKPOINT else _torchscript)(path)
    model = model.to(place)

    def network(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            answer: np.ndarray = model(torch.from_numpy(batch).to(place)).float().cpu().numpy()
        return answer

    return NetworkPredictor(facts, logits_to_run(facts, network), runtime=kind, name=str(path))


def open_plain_onnx(path: Path, *, runtime: str, threads: int, device: str) -> Predictor | None:
    """An ``ARCH.onnx`` of ``--jit``: normalised float images in, logits out."""
    if path.suffix != ".onnx" or not path.is_file():
        return None
    session = open_session(path, threads=threads, device=device)
    (taken, *more), text = session.get_inputs(), session.get_modelmeta().custom_metadata_map
    if more or taken.type != "tensor(float)" or METADATA_KEY not in text:
        return None
    if runtime not in ("auto", "onnx"):
        raise UsageError(f"--runtime {runtime}: {path} is a file for onnx")
    facts = facts_from_file(text[METADATA_KEY], where=path)

    def network(batch: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {taken.name: batch})[0])

    return NetworkPredictor(facts, logits_to_run(facts, network), runtime="onnx", name=str(path))


OPENERS = (open_torch, open_plain_onnx)


def _checkpoint(path: Path) -> tuple[Any, ModelFacts]:
    from shared_core.for_torch.checkpoints import fit_into, load_checkpoint
    from torch_cls_zoo.models import build_model

    weights, said = load_checkpoint(path, project="torch_cls_zoo")
    facts = facts_of_checkpoint(said, where=path)
    model = build_model(
        facts.architecture,
        num_classes=len(facts.class_names),
        image_size=facts.input_size,
        kept=said.get("pruned"),
    ).model
    fit_into(model, weights, path=path)
    return model.eval(), facts


def _torchscript(path: Path) -> tuple[Any, ModelFacts]:
    import warnings

    import torch

    extra: dict[str, str | bytes] = {FACTS: ""}
    try:
        with warnings.catch_warnings():  # TorchScript warns that it is old
            warnings.simplefilter("ignore")
            model = torch.jit.load(str(path), map_location="cpu", _extra_files=extra).eval()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: no TorchScript file, expected one of main.py --jit") from error
    return model, facts_from_file(extra[FACTS], where=path)
