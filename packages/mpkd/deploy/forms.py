"""Files beside the student's ONNX file: packed weights, OpenVINO (also int8 by NNCF), TensorRT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mpkd.deploy.openers import torch_run
from mpkd.utils.common import load_net
from mpkd.utils.config import INSTALL_OPENVINO
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.openvino_file import load_openvino, openvino_run, unreported
from shared_core.deploy.predictor import logits_to_run
from shared_core.deploy.quantize import check_symmetric, quantize_static
from shared_core.deploy.session import open_session
from shared_core.deploy.write import Form
from shared_core.for_torch.export import export_onnx

ONNX_FILE, PACKED_FILE = "model.onnx", "model.packed.safetensors"
IR, IR_INT8, TRT = "model.openvino.xml", "model.openvino.int8.xml", "model.tensorrt.onnx"
Images = npt.NDArray[np.uint8]


def packed_form(file: Path, facts: ModelFacts) -> Form:
    """The packed weights of the run, in the folder as well."""

    def write(folder: Path) -> Sequence[str]:
        shutil.copyfile(file, folder / PACKED_FILE)
        return [PACKED_FILE]

    return Form(write, lambda folder: torch_run(facts, load_net(folder / PACKED_FILE)[0]))


def openvino_form() -> Form:
    """OpenVINO's own file, made from the ONNX file in the folder; int8 stays where that has it."""

    def write(folder: Path) -> Sequence[str]:
        openvino = load_openvino(f"export.openvino ({INSTALL_OPENVINO})")
        with unreported():
            model = openvino.convert_model(str(folder / ONNX_FILE))
        openvino.save_model(model, str(folder / IR), compress_to_fp16=False)
        return [IR, Path(IR).with_suffix(".bin").name]

    return Form(write, lambda folder: openvino_run(folder / IR))


def nncf_form(calibration: Images) -> Form:
    """OpenVINO's int8 by NNCF, whose choice it is which inputs have offsets.

    Args:
        calibration: uint8 views ``(N, S, S, 3)``; labels are not needed.
    """

    def write(folder: Path) -> Sequence[str]:
        os.environ.setdefault("NNCF_CI", "1")  # NNCF asks this name before it reports its use
        openvino = load_openvino(f"export.openvino ({INSTALL_OPENVINO})")
        try:
            with unreported():
                import nncf
        except ImportError as error:
            raise ImportError(f"nncf is not installed: {INSTALL_OPENVINO}") from error
        with unreported():
            model = openvino.convert_model(str(folder / ONNX_FILE))
        batches = [calibration[i : i + 32] for i in range(0, len(calibration), 32)]
        made = nncf.quantize(
            model, nncf.Dataset(batches), subset_size=len(batches), fast_bias_correction=True
        )
        openvino.save_model(made, str(folder / IR_INT8), compress_to_fp16=False)
        return [IR_INT8, Path(IR_INT8).with_suffix(".bin").name]

    return Form(write, lambda folder: openvino_run(folder / IR_INT8), exact=False)


def tensorrt_form(net: nn.Module, facts: ModelFacts, calibration: Images) -> Form:
    """int8 with zero points of 0 everywhere and biases as floats; normalised images in, logits out.

    Args:
        net: plain, on the CPU.
        calibration: uint8 views.
    """

    def write(folder: Path) -> Sequence[str]:
        source = folder / "float.onnx"
        export_onnx(net, source, input_size=(3, *facts.input_size), check_batches=())
        quantize_static(
            source, folder / TRT, [facts.normalise(calibration)], scheme="s8s8",
            quantize_bias=False,
        )  # fmt: skip
        source.unlink()
        check_symmetric(folder / TRT)
        return [TRT]

    def run(folder: Path) -> Any:
        session = open_session(folder / TRT)
        name = session.get_inputs()[0].name
        return logits_to_run(facts, lambda images: session.run(None, {name: images})[0])

    return Form(write, run, exact=False)
