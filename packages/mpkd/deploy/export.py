"""The export stage: ONNX in fp32 and int8, OpenVINO, and what a TensorRT build needs."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpkd.dataset.data_utils import TEST
from mpkd.deploy.openvino_net import convert_openvino, load_openvino, openvino_model
from mpkd.deploy.tensorrt_build import build_command
from mpkd.quant.nncf_int8 import nncf_int8
from mpkd.quant.ort_int8 import ort_int8, run_onnx
from mpkd.run_context import Run
from shared_core.checkpoints import atomic_write
from shared_core.for_torch.export import export_onnx

KINDS = ("onnx", "qdq", "openvino", "tensorrt")
FP32, INT8, ABOUT = "student.onnx", "student_int8.onnx", "student.json"
TRT = "student_tensorrt.onnx"
IR, IR_INT8 = "student_openvino.xml", "student_openvino_int8.xml"
CHECK_IMAGES = 512  # test images on which runtimes are compared


@contextmanager
def quiet() -> Iterator[None]:
    """Without the quantizers' advice and deprecation notes, which a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_about(path: Path, facts: Mapping[str, Any]) -> None:
    """Classes, size and normalisation beside the exported files, for inference."""
    kept = {key: facts[key] for key in ("class_names", "input_size", "mean", "std", "split_hash")}
    text = json.dumps(kept, indent=1) + "\n"
    atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def export_all(run: Run, student: nn.Module, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write what ``export.*`` asks for into ``export/`` and compare answers on test images.

    Returns:
        File names, and for each the share of test images that get the same class as in torch.

    Raises:
        ExportError: a runtime's numbers differ from torch's; the int8 file's zero-points are not 0.
        ImportError: a runtime that is asked for is not installed.
    """
    folder = run.folder / "export"
    folder.mkdir(parents=True, exist_ok=True)
    config, size = run.config, run.data.image_size
    images, expected = _check_images(run, student)
    files: dict[str, Any] = {}
    # Every other file is made from it.
    found = export_onnx(student.cpu(), folder / FP32, input_size=(3, size, size))
    write_about(folder / ABOUT, facts)
    files["onnx"] = {
        "file": FP32, "max_abs": found.max_abs, "max_rel": found.max_rel,
        "agreement": _agreement(run_onnx(folder / FP32, images, threads=1), expected),
    }  # fmt: skip
    calibration = torch.cat(run.calibration_images()).cpu()
    if config["export.qdq"]:
        with quiet():
            made = ort_int8(folder / FP32, folder / INT8, calibration.numpy())
        files["qdq"] = {
            "file": INT8, "layers": made.heavy_quantized, "bytes": made.size_bytes,
            "agreement": _agreement(run_onnx(folder / INT8, images, threads=1), expected),
        }  # fmt: skip
    if config["export.openvino"]:
        with quiet():
            files |= _openvino(folder, student.cpu(), calibration, images, expected)
    if config["export.tensorrt"]:
        # TensorRT reads biases as floats: a file of its own.
        with quiet():
            made = ort_int8(folder / FP32, folder / TRT, calibration.numpy(), quantize_bias=False)
        command = build_command(TRT, image_size=size)
        files["tensorrt"] = {
            "file": TRT, "layers": made.heavy_quantized, "command": command,
            "agreement": _agreement(run_onnx(folder / TRT, images, threads=1), expected),
        }  # fmt: skip
        run.log.say(f"export: build the engine on the device: {command}")
    for kind, row in files.items():
        if "agreement" in row:
            run.log.say(f"export: {kind}: same class as torch on {row['agreement']:.4f} of images")
    return {"files": files}


def _check_images(run: Run, student: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Test images as the network sees them, float32 ``(N, 3, S, S)``, and torch's classes."""
    parts, count = [], 0
    for batch in run.evaluation_loader(TEST, shared=False):
        parts.append(batch.images.cpu().contiguous().numpy().copy())
        count += len(batch.labels)
        if count >= CHECK_IMAGES:
            break
    images = np.concatenate(parts)[:CHECK_IMAGES]
    with torch.no_grad():
        device = next(student.parameters()).device
        logits = student.eval()(torch.from_numpy(images).to(device)).cpu().numpy()
    return images, logits.argmax(axis=1)


def _agreement(logits: np.ndarray, expected: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == expected).mean())


def _openvino(
    folder: Path,
    student: nn.Module,
    calibration: torch.Tensor,
    images: np.ndarray,
    expected: np.ndarray,
) -> dict[str, Any]:
    """OpenVINO's files in fp32 and, by NNCF, in int8; with the share of equal classes."""
    found: dict[str, Any] = {}
    model = convert_openvino(student, images.shape[-1])
    load_openvino().save_model(model, str(folder / IR), compress_to_fp16=False)
    nncf_int8(student, folder / IR_INT8, calibration)
    for kind, file in (("openvino", IR), ("openvino_int8", IR_INT8)):
        logits = np.concatenate(list(run_openvino(folder / file, images)))
        found[kind] = {"file": file, "agreement": _agreement(logits, expected)}
    return found


def run_openvino(path: Path, images: np.ndarray, *, batch: int = 64) -> Iterator[np.ndarray]:
    """Logits of an OpenVINO file by batches, on one thread of the CPU."""
    compiled = openvino_model(path)
    for start in range(0, len(images), batch):
        yield compiled(images[start : start + batch])[compiled.output(0)]
