"""The files of a model folder that can be shipped, by form, and how each is opened."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from compare.contract import FLOAT, INT8
from shared_core.deploy.facts import ModelFacts, read_facts
from shared_core.deploy.openvino_file import openvino_run
from shared_core.deploy.predictor import (
    OPENVINO,
    NetworkPredictor,
    Predictor,
    open_model,
    whole_files,
)

OPENVINO_INT8, PADDLE = "openvino-int8", "paddle"
_SAME_FILE = {OPENVINO: FLOAT, OPENVINO_INT8: INT8}  # OpenVINO reads ONNX files itself


def forms_of(facts: ModelFacts) -> dict[str, tuple[str, ...]]:
    """The forms that this machine can run, with their files: never the training framework's own."""
    found = {form: facts.files[form] for form in (FLOAT, INT8) if form in facts.files}
    if find_spec("openvino") is not None and facts.exits is None:
        same = {form: found[source] for form, source in _SAME_FILE.items() if source in found}
        found |= same | {form: facts.files[form] for form in (OPENVINO,) if form in facts.files}
    if find_spec("paddle") is not None and PADDLE in facts.files:
        found[PADDLE] = facts.files[PADDLE]
    return found


def open_form(folder: Path, form: str, *, threads: int = 1, device: str = "cpu") -> Predictor:
    """A form of a model folder, at its default operating point.

    Raises:
        ModelError, FileNotFoundError: a file is damaged or missing.
    """
    if form in (FLOAT, INT8):
        return open_model(folder, runtime=form, threads=threads, device=device)
    facts = read_facts(folder)
    key = form if form in facts.files else _SAME_FILE[form]
    file = whole_files(folder, facts, key)[0]
    if form == PADDLE:
        from shared_core.for_paddle.inference import paddle_inference

        run = paddle_inference(file.with_suffix(""), threads=threads)
    else:
        run = openvino_run(file, threads=threads)
    found = NetworkPredictor(facts, run, runtime=form, name=str(file))
    found.threads = threads
    return found
