"""The export stage: parity, symmetric int8, and TensorRT's script up to the engine."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from mpkd.deploy import tensorrt_build
from mpkd.quant.ort_int8 import check_qdq, run_onnx
from mpkd.utils.common import load_net


def test_the_files_give_torchs_numbers(finished):
    folder, _ = finished
    net, facts = load_net(folder / "checkpoints" / "student.pth")
    export = folder / "export"
    onnx.checker.check_model(onnx.load(str(export / "student.onnx")))
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = net(torch.from_numpy(images)).numpy()
    assert np.abs(run_onnx(export / "student.onnx", images) - wanted).max() < 1e-4
    about = json.loads((export / "student.json").read_text())
    assert about["class_names"] == facts["class_names"] and about["mean"] == facts["mean"]
    stages = json.loads((folder / "stages.json").read_text())["export"]["files"]
    assert stages["onnx"]["agreement"] == 1.0 and stages["qdq"]["agreement"] > 0.9


def test_int8_files_are_symmetric(finished):
    export = finished[0] / "export"
    first, second = (check_qdq(export / f"student_{n}.onnx") for n in ("int8", "tensorrt"))
    assert first.heavy == first.heavy_quantized == second.heavy_quantized == 3
    assert "int32" in first.kinds and second.kinds == ("int8",)


def test_tensorrt_up_to_the_engine(tmp_path, finished, command):
    export = finished[0] / "export"
    model = export / "student_tensorrt.onnx"
    main = tensorrt_build.main
    done = command(model, "--image-size", 8, "--check", entry=main)
    assert done.code == 0 and "all zero points 0" in done.out
    done = command(model, "--image-size", 8, entry=main)
    assert done.code == 1 and "tensorrt is not installed" in done.err
    done = command(export / "student.onnx", "--image-size", 8, entry=main)
    assert done.code == 1 and "expected a quantized graph" in done.err
    done = command(export / "student_int8.onnx", "--image-size", 8, entry=main)
    assert done.code == 1 and "quantized biases" in done.err
    assert command(tmp_path / "none.onnx", "--image-size", 8, entry=main).code == 1
    assert command(model, "--image-size", 8, "--max-batch", 0, entry=main).code == 2


class _Recorder:
    """Stands in for the package tensorrt and notes what it is asked for."""

    INT8 = "int8"

    def __init__(self, *, parses: bool = True) -> None:
        self.parses, self.shapes, self.flags = parses, [], []
        self.Logger = self.BuilderFlag = self
        self.WARNING = 1

    def __call__(self, *_args):
        return self

    def Builder(self, _logger):  # noqa: N802
        return self

    def OnnxParser(self, _network, _logger):  # noqa: N802
        return self

    def create_network(self, _flags):
        return self

    def parse(self, data):
        assert data
        return self.parses

    def get_error(self, _n):
        return "bad node"

    def create_builder_config(self):
        return self

    def set_flag(self, flag):
        self.flags.append(flag)

    def create_optimization_profile(self):
        return self

    def get_input(self, _n):
        return type("Input", (), {"name": "image"})

    def set_shape(self, *shapes):
        self.shapes.append(shapes)

    def add_optimization_profile(self, _profile):
        pass

    def build_serialized_network(self, _network, _config):
        return b"engine"


def test_the_engine_is_asked_for_with_the_right_shapes(finished):
    model = finished[0] / "export" / "student_tensorrt.onnx"
    trt = _Recorder()
    assert tensorrt_build.build_engine(trt, model, size=8, batch=4) == b"engine"
    assert trt.shapes == [("image", (1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8))]
    assert trt.flags == ["int8"]
    with pytest.raises(ValueError, match="cannot read it: bad node"):
        tensorrt_build.build_engine(_Recorder(parses=False), model, size=8, batch=4)
