"""export.py: every written file gives the model's answers, int8 comes under its contract.

How a network is wrapped, quantized and measured is the core's, and is tested there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import vgc_tools as tools

from shared_core import smallvision
from shared_core.deploy import contract, write
from shared_core.deploy.check import ExportError
from shared_core.deploy.facts import read_facts
from shared_core.deploy.predictor import open_model
from shared_core.deploy.session import open_session
from shared_core.deploy.write import Calibration
from shared_core.for_paddle import inference as paddle_inference
from shared_core.for_paddle.efficientnet_lite import EfficientNetLite
from visiondistill_gc import export, inference
from visiondistill_gc.deploy import forms, images
from visiondistill_gc.deploy.openers import OPENERS, open_paddle
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.utils.model_files import load_model

CLASSES = tools.CLASSES
for name in ("paddle2onnx", "onnx", "onnxruntime"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tools.save(tmp_path_factory.mktemp("model") / "m.pdparams")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Pictures in folders of the class that the model sees in them."""
    root = tmp_path_factory.mktemp("labelled")
    pixels = tools.make_pixels(48)
    best = tools.true_probabilities(pixels).argmax(axis=1)
    for name in CLASSES:
        (root / name).mkdir()
    for index, (one, k) in enumerate(zip(pixels, best, strict=True)):
        (root / CLASSES[k] / f"{index}.png").write_bytes(tools.encode(one))
    return root, pixels


@pytest.fixture(scope="module")
def exported(model, labelled, tmp_path_factory):
    """A folder whose files were judged on labelled pictures; one of them cannot be read."""
    folder = tmp_path_factory.mktemp("an export")
    data = tmp_path_factory.mktemp("judges")
    shutil.copytree(labelled[0], data, dirs_exist_ok=True)
    (data / CLASSES[0] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    done = tools.call(export, model, folder, "--accuracy", data)
    assert done.code == 0, done.err
    return folder, done


@pytest.mark.parametrize("runtime", ["onnx", "paddle"])
def test_answers_are_the_model_s(exported, runtime):
    """Checked on other pictures than the command itself looks at."""
    pixels = tools.make_pixels(60)[48:]
    views = np.stack([tools.cv2.resize(p, (32, 32)) for p in pixels])
    predictor = open_model(exported[0], runtime=runtime, openers=OPENERS)
    assert predictor.runtime == runtime and predictor.facts.mean == tools.MEAN
    truth = tools.true_probabilities(pixels)
    for size in (1, 5, 12):  # the batch size is free
        parts = [views[i : i + size] for i in range(0, 12, size)]
        got = np.concatenate([predictor.probabilities(part) for part in parts])
        np.testing.assert_allclose(got, truth, atol=3e-4)


def test_the_record_of_the_export(exported, model):
    folder, done = exported
    facts, loaded = read_facts(folder), load_model(model)
    assert facts.class_names == CLASSES and facts.input_size == (32, 32)
    assert facts.provenance["split_hash"] == "a" * 64
    assert facts.provenance["checkpoint_sha256"] == loaded.facts["sha256"]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.json", "model.onnx", "student.json", "student.pdiparams", "README.md",
    }  # fmt: skip
    assert facts.costs["parameters"] == sum(
        int(p.size) for n, p in loaded.net.named_parameters()
        if n.rsplit(".", 1)[-1] not in ("_mean", "_variance")
    )  # fmt: skip
    for runtime in ("onnx", "paddle"):
        row = facts.measured["files"][runtime]
        assert row["agreement"]["images"] == 48 and row["accuracy"]["value"] == 1.0
    assert "left out 1 images that cannot be read" in done.err and "broken.png" in done.err


def test_multiply_accumulates_are_those_of_the_published_table():
    """Sandler et al. 2018, table 2: expansion, channels, repeats, stride; then the head."""
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
             (6, 160, 3, 2), (6, 320, 1, 1)]  # fmt: skip
    side, width, total = 112, 32, 112 * 112 * 32 * 27
    for expansion, channels, repeats, stride in table:
        for number in range(repeats):
            hidden, step = width * expansion, stride if number == 0 else 1
            if expansion > 1:
                total += side * side * width * hidden
            side //= step
            total += side * side * hidden * (9 + channels)
            width = channels
    total += side * side * width * 1280 + 1280 * 1024 + 1024 * 4
    assert forms.macs_of(build_student(num_classes=4), (224, 224)) == total
    assert total == pytest.approx(300e6, rel=0.01)


@pytest.mark.parametrize("size", [64, 33])
def test_an_efficientnet_lite_answers_the_same_from_onnx(tmp_path, size):
    """Its stride-2 convolutions pad unevenly; Paddle2ONNX mixed the sizes up."""
    paddle.seed(0)
    net = build_student(num_classes=4, name="efficientnet_lite0", frozen=0)
    net.eval()
    plain = EfficientNetLite("efficientnet_lite0", num_classes=4)
    plain.set_state_dict(net.state_dict())
    plain.eval()
    images = np.random.default_rng(0).normal(size=(3, 3, size, size)).astype(np.float32)
    truth = plain(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(net(paddle.to_tensor(images)).numpy(), truth, atol=1e-4)
    facts = SimpleNamespace(input_size=(size, size))
    path = forms.onnx_source(net, facts, tmp_path, opset=17)
    found = open_session(path).run(None, {"image": images})[0]
    np.testing.assert_allclose(found, truth, atol=1e-3 * np.abs(truth).max())


def test_inference_takes_the_folder(model, exported, labelled, tmp_path):
    rows = {}
    for name, path, words in (
        ("model", model, ()),
        ("onnx", exported[0], ()),
        ("paddle", exported[0], ("--runtime", "paddle")),
    ):
        target = tmp_path / f"{name}.json"
        words = ("--model_path", path, "--image_path", labelled[0], "--json", target, *words)
        done = tools.call(inference, *words)
        assert done.code == 0, done.err
        said = json.loads(target.read_text())
        assert said["runtime"] == ("dygraph" if name == "model" else name)
        rows[name] = np.array([row["probabilities"] for row in said["images"]])
    np.testing.assert_allclose(rows["onnx"], rows["model"], atol=3e-4)
    np.testing.assert_allclose(rows["paddle"], rows["model"], atol=3e-4)


def test_the_core_s_command_takes_the_folder(exported, labelled, tmp_path):
    words = ["evaluate", exported[0], labelled[0], "--latency-batches", "--json", tmp_path / "e"]
    done = tools.call(smallvision, *words)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "e").read_text())["accuracy"]["value"] == 1.0


def test_which_runtime_is_taken_when_none_is_asked_for(exported, monkeypatch):
    folder, how = exported[0], {"runtime": "auto", "threads": 1, "device": "cpu"}
    assert open_paddle(folder, **how) is None  # the core opens its ONNX file
    monkeypatch.setattr("visiondistill_gc.deploy.openers.find_spec", lambda name: None)
    assert open_paddle(folder, **how).runtime == "paddle"  # without ONNX Runtime


# -- int8 -----------------------------------------------------------------------------------------


def pretend(monkeypatch, *, int8_ms):
    """int8's time against 1 ms in float: no test hangs on the processor at hand."""
    times = {"float": {"1": {"cpu_ms": 1.0}}, "int8": {"1": {"cpu_ms": int8_ms}}}
    monkeypatch.setattr(contract, "_times", lambda *_: times)


def test_int8_that_is_kept_is_in_the_folder_and_judged(model, labelled, tmp_path, monkeypatch):
    pretend(monkeypatch, int8_ms=0.5)
    words = ("--int8", "--calibration", labelled[0], "--max-accuracy-loss", "1")
    done = tools.call(export, model, tmp_path / "a", "--format", "onnx", *words)
    assert done.code == 0, done.err
    facts = read_facts(tmp_path / "a")
    assert facts.files["onnx-int8"] == ("model.int8.onnx",) and "int8 kept" in done.out
    assert facts.measured["int8"]["float_score"] == 1.0  # of labels, which folders tell


def test_int8_that_breaks_the_contract_is_refused_with_the_numbers(
    model, labelled, tmp_path, monkeypatch
):
    pretend(monkeypatch, int8_ms=2.0)
    methods, real = [], contract.Quantizer

    def watch(path, feed, **settings):
        methods.append((settings["method"], sum(map(len, feed))))
        return real(path, feed, **settings)

    monkeypatch.setattr(contract, "Quantizer", watch)
    words = ("--int8", "--calibration", labelled[0], "--max-accuracy-loss", "0.25",
             "--int8-method", "percentile", "--format", "onnx")  # fmt: skip
    done = tools.call(export, model, tmp_path / "a", *words)
    assert done.code == 1 and "int8 refused: " in done.out and "0.50 times as fast" in done.out
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "model.onnx" in names and "model.int8.onnx" not in names
    found = read_facts(tmp_path / "a").measured["int8"]
    assert found["max_accuracy_loss"] == 0.25 and not found["kept"]
    assert methods == [("percentile", 24)]  # every second picture judges
    # For another device speed is not asked for.
    done = tools.call(
        export, model, tmp_path / "b", *words, "--int8", "yes", "--max-accuracy-loss", "1"
    )
    assert done.code == 0 and read_facts(tmp_path / "b").measured["int8"]["kept"]


def test_an_unreadable_calibration_image_is_left_out(labelled, tmp_path, capsys, model):
    for path in labelled[0].rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "aa.jpg").write_bytes(b"\xff\xd8 no image")
    view = tools_view(model)
    found = images.calibration_of(tmp_path, None, CLASSES, view)
    assert len(found.images) == 48 and found.labels is None  # the folder names no class
    assert "left out 1 images" in capsys.readouterr().err
    with_labels = images.calibration_of(labelled[0], None, CLASSES, view)
    truth = tools.true_probabilities(labelled[1]).argmax(axis=1)
    assert sorted(with_labels.labels) == sorted(truth)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image can be read"):
        images.calibration_of(tmp_path, None, CLASSES, view)


def tools_view(model):
    return open_model(model, openers=OPENERS).view


def test_accuracy_leaves_out_copies_of_calibration_images(labelled, tmp_path):
    root, _ = labelled
    (tmp_path / CLASSES[0]).mkdir()
    for path in sorted(root.rglob("*.png"))[:3]:
        (tmp_path / CLASSES[0] / path.name).write_bytes(path.read_bytes())
    new = tmp_path / CLASSES[0] / "new.png"
    new.write_bytes(tools.encode(tools.make_pixels(60)[59]))
    files, labels = images.judges_in(tmp_path, CLASSES, calibration=root)
    assert files == [new] and labels.tolist() == [0]
    assert len(images.judges_in(tmp_path, CLASSES, calibration=None)[0]) == 4
    new.unlink()
    with pytest.raises(ValueError, match="no image that is not in --calibration"):
        images.judges_in(tmp_path, CLASSES, calibration=root)


def test_the_limit_of_unsure_is_the_smallest_that_keeps_its_promise():
    best = np.array([0.9, 0.8, 0.7, 0.6, 0.55])
    said = np.stack([best, 1 - best], axis=1)
    labels = np.array([0, 0, 0, 1, 0])  # the fourth is wrong
    network = SimpleNamespace(probabilities=lambda images: said[images[:, 0, 0, 0]])
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=3)
    found = {
        share: images.unsure_below(network, Calibration(pixels, labels), share)
        for share in (0.5, 0.8, 0.9)
    }
    assert found == {0.5: 0.55, 0.8: 0.55, 0.9: 0.7}
    with pytest.raises(ValueError, match="no limit reaches it"):
        images.unsure_below(network, Calibration(pixels, 1 - labels), 0.9)
    with pytest.raises(ValueError, match="needs labels"):
        images.unsure_below(network, Calibration(pixels), 0.9)


def test_labels_come_from_folders(tmp_path):
    paths = [tmp_path / "b" / "1.png", tmp_path / "x" / "a" / "2.png"]
    assert images.labels_of(tmp_path, paths, ["a", "b"]).tolist() == [1, 0]
    assert images.labels_of(tmp_path, [*paths, tmp_path / "3.png"], ["a", "b"]) is None


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--int8"], 2, "expected --calibration"),
        (["--calibration", "."], 2, "expected --int8"),
        (["--int8-method", "percentile"], 2, "expected --int8"),
        (["--max-accuracy-loss", "0.1"], 2, "expected --int8"),
        (["--format", "paddle", "--calibration", ".", "--int8"], 2, "expected --format onnx"),
        (["--opset", "9"], 2, "expected 13 to 17"),
        (["--categories", "a", "b"], 1, "categories are a b"),
        (["--int8", "--calibration", "/no/such/folder"], 1, "is not a folder"),
    ],
)
def test_flags_work_or_are_refused_before_anything_is_written(model, tmp_path, words, code, said):
    done = tools.call(export, model, tmp_path / "new", *words)
    assert done.code == code and said in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_python_3_13_is_refused_for_onnx_in_one_line_and_paddle_still_works(
    model, tmp_path, monkeypatch
):
    real = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda n: None if n == "paddle2onnx" else real(n))
    done = tools.call(export, model, tmp_path / "a")
    assert done.code == 1 and "pip install" in done.err
    monkeypatch.setattr(export, "sys", SimpleNamespace(version_info=(3, 13, 1)))
    done = tools.call(export, model, tmp_path / "a")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "no release for Python 3.13" in done.err and "--format paddle" in done.err
    done = tools.call(export, model, tmp_path / "a", "--format", "paddle")
    assert done.code == 0, done.err
    assert open_model(tmp_path / "a", openers=OPENERS).runtime == "paddle"


def test_no_installer_runs_at_export_time(model, tmp_path, monkeypatch):
    """Paddle2ONNX's default optimizer calls pip by itself."""
    import os

    def refuse(*words, **_):
        raise AssertionError(f"started {words}")

    for owner, name in ((subprocess, "Popen"), (subprocess, "run"), (os, "system")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.delenv("POLYGRAPHY_AUTOINSTALL_DEPS", raising=False)
    monkeypatch.setattr(write.Making, "described", lambda *_: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):  # written and checked; what comes next asks git for its commit
        tools.call(export, model, tmp_path / "a", "--format", "onnx")
    assert "POLYGRAPHY_AUTOINSTALL_DEPS" not in os.environ


@pytest.mark.parametrize("kind", ["onnx", "paddle"])
def test_a_file_that_gives_other_answers_is_no_export(model, tmp_path, monkeypatch, kind):
    other = tools.make_net(seed=1)
    if kind == "onnx":
        real = forms.export_onnx
        monkeypatch.setattr(forms, "export_onnx", lambda net, *a, **k: real(other, *a, **k))
    else:
        real = forms.Answering
        monkeypatch.setattr(forms, "Answering", lambda net, facts: real(other, facts))
    done = tools.call(export, model, tmp_path / "a", "--format", kind)
    assert done.code == 1 and "expected" in done.err and not (tmp_path / "a").exists()
    assert issubclass(ExportError, ValueError)


def test_a_file_that_was_swapped_or_is_missing_is_refused_in_one_line(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    words = ("--model_path", copy, "--image_path", exported[0], "--runtime", "paddle")
    forms.paddle_form(tools.make_net(seed=1), read_facts(copy)).write(copy)  # sound, but another
    done = tools.call(inference, *words)
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert "is damaged or another file" in done.err
    (copy / "student.pdiparams").unlink()
    done = tools.call(inference, *words)
    assert done.code == 1 and "student.pdiparams" in done.err and done.err.count("\n") == 1
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.pdiparams").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="Paddle Inference cannot open it"):
        paddle_inference.paddle_inference(tmp_path / "bad")


def test_onnx_needs_no_paddle_in_memory(exported):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from visiondistill_gc import serve\n"
        "from visiondistill_gc.deploy.openers import open_checked\n"
        "from shared_core.deploy.options import ModelOptions\n"
        "from pathlib import Path\n"
        "open_checked(ModelOptions(Path(sys.argv[3])), categories=None, use_gpu=False)\n"
        "print('paddle' in sys.modules)"
    )
    roots = [tools.REPOSITORY / "packages", tools.REPOSITORY / "shared"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, roots), str(exported[0])],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr


def test_paddle_inference_refuses_a_gpu_that_is_not_there(exported):
    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle has CUDA")
    with pytest.raises(ValueError, match="use_gpu"):
        paddle_inference.paddle_inference(exported[0] / "student", gpu=True)
