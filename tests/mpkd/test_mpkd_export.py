"""The export stage: what is shipped is what was measured, in every form, and TensorRT's script."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mpkd.deploy import forms, tensorrt_build
from mpkd.deploy.export import ExportData, ExportWishes, export_student
from mpkd.deploy.openers import OPENERS, facts_of
from mpkd.quant.layers import quant_layers, quantizable, quantize_trained
from mpkd.quant.shipped import shipped
from mpkd.utils.common import load_net, save_net, save_packed
from shared_core.deploy.check import ExportError
from shared_core.deploy.facts import read_facts
from shared_core.deploy.predictor import open_model
from shared_core.deploy.quantize import qdq_facts

NOTHING = ExportWishes(True, False, False, False, False, 0.01)


def test_the_folder_answers_as_the_quantized_student_over_the_whole_split(finished):
    """And not as the float one: what is measured is what is shipped."""
    folder, _ = finished
    stages = json.loads((folder / "stages.json").read_text())
    facts = read_facts(folder / "export")
    assert facts.project == "mpkd" and facts.provenance["quantization"] == "ptq"
    row = facts.measured["files"]["onnx"]
    assert row["accuracy"]["value"] == pytest.approx(stages["quantize"]["test_accuracy"], abs=0.01)
    assert row["accuracy"]["images"] == stages["prepare"]["splits"]["test"]
    assert stages["export"]["measured"] == facts.as_dict()["measured"]
    net, _ = load_net(folder / "checkpoints" / "student_quantized.pth")
    plain, _ = load_net(folder / "checkpoints" / "student.pth")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    got = open_model(folder / "export").probabilities(images)
    with torch.no_grad():
        normal = torch.from_numpy(facts.normalise(images))
        wanted, other = (one(normal).softmax(1).numpy() for one in (net, plain))
    assert np.abs(got - wanted).max() < 0.5 * np.abs(other - wanted).max()


def test_bytes_are_counted_on_disk(finished):
    folder, _ = finished
    facts = read_facts(folder / "export")
    for name, size in facts.costs["bytes"].items():
        assert (folder / "export" / name).stat().st_size == size
    assert forms.PACKED_FILE in facts.costs["bytes"]
    packed = open_model(folder / "export", runtime="packed", openers=OPENERS)
    images = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    net, known = load_net(folder / "checkpoints" / "student_quantized.pth")
    with torch.no_grad():
        wanted = net(torch.from_numpy(facts_of(known).normalise(images))).softmax(1)
    np.testing.assert_allclose(packed.probabilities(images), wanted.numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def data(mpkd_digits):
    """The digits' test and calibration images as an export wants them."""
    run = mpkd_digits.run
    test = [(b.images.copy(), b.labels) for b in run.evaluation_loader("test").loader]
    return ExportData(test, run.calibration_pixels()[:64])


def saved(digits, net, path):
    """A checkpoint of ``net``, and its facts."""
    from mpkd.utils.common import describe_net, describe_quantization

    config = digits.run.config | {"model.student_widths": [16, 16, 64]}
    save_net(
        path, net.state_dict(), describe_net("student", config, image_size=16),
        classes=digits.run.data.classes, split_hash="0" * 64, epoch=1, metrics={}, config=config,
        quantization=describe_quantization(net),
    )  # fmt: skip
    return load_net(path)


@pytest.mark.parametrize(
    ("w", "a", "fold", "symmetric"),
    [(2, 2, False, True), (3, 8, True, False), (4, 4, False, True), (8, 8, True, True),
     (2, 32, True, True), (12, 12, False, True)],
)  # fmt: skip
def test_every_kind_of_bits_goes_into_the_file_with_its_own_scales(
    tmp_path, mpkd_digits, data, w, a, fold, symmetric
):
    names = quantizable(mpkd_digits.net)
    bits = {n: w for n in names}
    made = quantize_trained(
        mpkd_digits.net, bits, dict.fromkeys(names, a), calibration=mpkd_digits.calibration,
        fold=fold, symmetric=symmetric,
    )  # fmt: skip
    net, known = saved(mpkd_digits, made, tmp_path / "student.pth")
    packed = tmp_path / "packed.safetensors"
    size = save_packed(packed, shipped(net), known)
    written = export_student(tmp_path / "export", net, known, NOTHING, data, packed=packed)
    ends = 2**w - symmetric  # values of a weight
    assert read_facts(tmp_path / "export").more["w_levels"] == dict.fromkeys(names, ends)
    row = written.facts.measured["files"]
    accuracy = mpkd_digits.evaluate(made)
    assert row["onnx"]["accuracy"]["value"] == pytest.approx(accuracy, abs=0.01)
    assert row["packed"]["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-9)
    near = 0.05 if a == 8 else 1e-3  # the runtime's 8-bit kernels round biases
    assert row["onnx"]["agreement"]["max_distance"] < near
    assert row["onnx"]["agreement"]["same_class"] >= 0.99
    assert row["packed"]["agreement"]["max_distance"] == 0.0
    assert row["packed"]["bytes"] == {forms.PACKED_FILE: size}
    graph = onnx.load(str(tmp_path / "export" / "model.onnx")).graph
    held = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for name, layer in quant_layers(shipped(net)).items():
        low, high = (-(2 ** (w - 1)) + 1, 2 ** (w - 1) - 1) if symmetric else (0, 2**w - 1)
        stored = held[f"{name}.weight/q"]
        assert low <= stored.min() and stored.max() <= high and stored.dtype.kind in "iu"
        scale = held[f"{name}.weight/scale"]
        np.testing.assert_array_equal(scale, layer.weight_quantizer.scale.detach().numpy())
    found = qdq_facts(tmp_path / "export" / "model.onnx")
    assert found.heavy == 4 and found.heavy_quantized == (4 if a != 32 else 0)


def test_a_file_with_other_scales_is_refused(tmp_path, monkeypatch, mpkd_digits, data):
    """The check is against the quantized network over the whole split."""
    names = quantizable(mpkd_digits.net)
    four = dict.fromkeys(names, 4)
    made = quantize_trained(mpkd_digits.net, four, four, calibration=mpkd_digits.calibration)
    net, known = saved(mpkd_digits, made, tmp_path / "student.pth")
    from mpkd.deploy import export as module

    given = module.with_own_grids

    def wrong(model, shipped_net):
        made = given(model, shipped_net)
        for one in made.graph.initializer:
            if one.name == "features.1.0/scale":
                one.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(one), one.name))
        return made

    monkeypatch.setattr(module, "with_own_grids", wrong)
    with pytest.raises(ExportError):
        export_student(tmp_path / "export", net, known, NOTHING, data)
    assert not (tmp_path / "export" / "model.json").exists()


def test_int8_of_a_float_student_keeps_its_contract(tmp_path, mpkd_digits, data):
    """Ranges from images, no own grids: kept for another device, or refused where it is slow."""
    net, known = saved(mpkd_digits, mpkd_digits.net, tmp_path / "student.pth")
    wishes = ExportWishes(True, True, False, False, True, 0.02)
    written = export_student(tmp_path / "a", net, known, wishes, data)
    assert written.int8.kept and "onnx-int8" in written.facts.files
    loss = mpkd_digits.accuracy - written.facts.measured["files"]["onnx-int8"]["accuracy"]["value"]
    assert loss <= 0.02
    impossible = ExportWishes(True, True, False, False, True, 0.0)
    found = export_student(tmp_path / "b", net, known, impossible, data)
    assert found.int8.kept == ("onnx-int8" in found.facts.files)  # refused, or nothing was lost


@pytest.mark.slow
def test_openvinos_files_answer_alike(tmp_path, mpkd_digits, data):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    names = quantizable(mpkd_digits.net)
    four = dict.fromkeys(names, 4)
    wishes = ExportWishes(True, False, True, False, False, 0.01)
    made = quantize_trained(mpkd_digits.net, four, four, calibration=mpkd_digits.calibration)
    for name, one in (("plain", mpkd_digits.net), ("bits", made)):
        net, known = saved(mpkd_digits, one, tmp_path / f"{name}.pth")
        written = export_student(tmp_path / name, net, known, wishes, data)
        rows = written.facts.measured["files"]
        assert set(rows) == {"onnx", "openvino", *(["openvino-int8"] if name == "plain" else [])}
        for runtime, row in rows.items():
            accuracy = row["accuracy"]["value"]
            assert accuracy == pytest.approx(mpkd_digits.evaluate(one), abs=0.02), runtime
        for runtime in ("openvino", "openvino-int8")[: len(rows) - 1]:
            found = open_model(tmp_path / name, runtime=runtime, openers=OPENERS)
            images, labels = data.test[0]
            assert (found.probabilities(images).argmax(1) == labels).mean() > 0.9


def test_tensorrt_up_to_the_engine(tmp_path, finished, command):
    export = finished[0] / "export"
    model = export / forms.TRT
    assert qdq_facts(model).symmetric and qdq_facts(model).kinds == ("int8",)
    main = tensorrt_build.main
    done = command(model, "--image-size", 8, "--check", entry=main)
    assert done.code == 0 and "all zero points 0" in done.out
    done = command(model, "--image-size", 8, entry=main)
    assert done.code == 1 and "tensorrt is not installed" in done.err
    done = command(export / "model.onnx", "--image-size", 8, entry=main)
    assert done.code == 1 and "expected 0 everywhere" in done.err
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
    model = finished[0] / "export" / forms.TRT
    trt = _Recorder()
    assert tensorrt_build.build_engine(trt, model, size=8, batch=4) == b"engine"
    assert trt.shapes == [("image", (1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8))]
    assert trt.flags == ["int8"]
    with pytest.raises(ValueError, match="cannot read it: bad node"):
        tensorrt_build.build_engine(_Recorder(parses=False), model, size=8, batch=4)
