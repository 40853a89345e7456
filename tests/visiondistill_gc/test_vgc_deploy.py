"""export.py: every written network gives the model's numbers, int8 comes with its price."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from visiondistill_gc import deploy_images, deploy_model, export, inference, quantization
from visiondistill_gc.utils.model_files import load_model

_spec = importlib.util.spec_from_file_location(
    "vgc_tools", Path(__file__).with_name("vgc_tools.py")
)
tools = importlib.util.module_from_spec(_spec)
sys.modules["vgc_tools"] = tools  # its dataclasses look themselves up
_spec.loader.exec_module(tools)

CLASSES = tools.CLASSES
for name in ("paddle2onnx", "onnx", "onnxruntime"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tools.save(tmp_path_factory.mktemp("model") / "m.pdparams")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Pictures in folders of the class that the model sees in them, but for one of each folder."""
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
    folder = tmp_path_factory.mktemp("an export")
    words = ("--int8", "--calibration", labelled[0])
    done = tools.call(export, model, folder, *words)
    assert done.code == 0, done.err
    return folder, done


@pytest.mark.parametrize("runtime", ["onnx", "paddle"])
def test_logits_are_the_model_s(model, exported, labelled, runtime):
    """Checked on other pictures than the command itself looks at."""
    loaded = load_model(model)
    network = deploy_model.dygraph_network(loaded.net)
    images = tools.views(labelled[1][:20])
    expected = network(images).astype(np.float64)
    classifier = deploy_model.load_classifier(exported[0], runtime=runtime)
    assert classifier.description.mean == tools.MEAN and classifier.runtime == runtime
    for size in (1, 3, 20):  # the batch size is free
        got = np.concatenate([classifier.network(images[i : i + size]) for i in range(0, 20, size)])
        limit = json.loads((exported[0] / "model.json").read_text())["parity"]["limit"]
        assert np.abs(got - expected).max() / np.abs(expected).max() < 2 * limit < 1e-3


def test_the_record_of_the_export(exported):
    folder, done = exported
    facts = json.loads((folder / "model.json").read_text())
    assert facts["class_names"] == list(CLASSES) and facts["input_size"] == [32, 32]
    assert facts["opset"] == 17 and facts["source"]["split_hash"] == "a" * 64
    parity = facts["parity"]
    assert parity["limit"] == max(1e-5, 4 * parity["own_rounding"])
    assert 0 <= parity["onnx"] < parity["limit"] and 0 <= parity["paddle"] < parity["limit"]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.json", "student.onnx", "student-int8.onnx", "student.json", "student.pdiparams",
    }  # fmt: skip
    assert "parity of onnx with dygraph" in done.out and "int8 (minmax" in done.out


def test_inference_takes_the_folder(model, exported, labelled, tmp_path):
    images = labelled[0]
    rows = {}
    for name, path, words in (
        ("model", model, ()),
        ("onnx", exported[0], ()),
        ("paddle", exported[0], ("--runtime", "paddle")),
    ):
        target = tmp_path / f"{name}.json"
        words = ("--model_path", path, "--image_path", images, "--json", target, *words)
        done = tools.call(inference, *words)
        assert done.code == 0, done.err
        said = json.loads(target.read_text())
        rows[name] = np.array([row["probabilities"] for row in said["images"]])
    np.testing.assert_allclose(rows["onnx"], rows["model"], atol=3e-4)
    np.testing.assert_allclose(rows["paddle"], rows["model"], atol=3e-4)


# -- int8 -----------------------------------------------------------------------------------------


def test_the_int8_file_is_int8_and_its_report_is_true(exported, labelled):
    import onnx

    folder, _ = exported
    report = json.loads((folder / "model.json").read_text())["int8"]
    graph = onnx.load(str(folder / "student-int8.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("BatchNormalization") == 1  # the head's; the others are in convolutions
    assert report["layers"] == kinds.count("Conv") + kinds.count("Gemm") + kinds.count("MatMul")
    weights = {t.name: t.data_type for t in graph.initializer}
    assert list(weights.values()).count(onnx.TensorProto.INT8) >= report["layers"]
    assert report["int8_bytes"] < report["fp32_bytes"]
    # By hand: half of the files judge, in the command's own order; the rest calibrates.
    files, judges, labels = export.split_images(labelled[0], None, CLASSES)
    assert not set(files) & set(judges) and len(files) + len(judges) == 48
    assert report["images"] == len(judges) == 24 and report["calibration_images"] == 24
    exact, rounded = (
        deploy_model.load_classifier(folder, runtime=r) for r in ("onnx", "onnx-int8")
    )
    pixels = np.stack([labelled[1][int(path.stem)] for path in judges])
    first, second = (one.network(tools.views(pixels)) for one in (exact, rounded))
    same = (first.argmax(1) == second.argmax(1)).mean()
    assert report["same_class"] == pytest.approx(same, abs=0.05)
    assert report["fp32_accuracy"] == pytest.approx((first.argmax(1) == labels).mean(), abs=0.05)
    assert report["int8_accuracy"] == pytest.approx((second.argmax(1) == labels).mean(), abs=0.05)
    # The files' own folders name their classes.
    assert [CLASSES[k] for k in labels] == [path.parent.name for path in judges]


def test_int8_of_a_shallow_network_says_what_the_network_says(tmp_path):
    """The deep random student is chaotic; in two layers only the rounding itself is left."""
    import paddle

    from shared_core.for_paddle.export import export_onnx

    paddle.seed(0)
    net = paddle.nn.Sequential(
        paddle.nn.Conv2D(3, 8, 3), paddle.nn.ReLU(), paddle.nn.Flatten(), paddle.nn.Linear(288, 5)
    )
    images = np.random.default_rng(0).standard_normal((200, 3, 8, 8)).astype(np.float32)
    export_onnx(net, tmp_path / "a.onnx", input_size=(3, 8, 8))
    layers = quantization.quantize_static(tmp_path / "a.onnx", tmp_path / "b.onnx", images[:100])
    exact, rounded = (
        deploy_model.onnx_network(tmp_path / name)(images[100:]) for name in ("a.onnx", "b.onnx")
    )
    report = quantization.compare(exact, rounded)
    assert layers == 2 and 0 < report["relative_error"] < 0.03 and report["same_class"] >= 0.95


def test_the_comparison_by_hand():
    exact = np.array([[2.0, 1, 0], [0, 3, 0], [0, 0, 4.0], [5, 0, 0]])
    rounded = exact.copy()
    rounded[0] = [1, 2, 0]
    report = quantization.compare(exact, rounded, [0, 1, 2, 1], ["a", "b", "c"])
    assert report["images"] == 4 and report["same_class"] == 0.75
    assert report["fp32_accuracy"] == 0.75 and report["int8_accuracy"] == 0.5
    assert report["relative_error"] == pytest.approx(np.sqrt(2) / np.sqrt(5 + 9 + 16 + 25))
    assert report["by_class"]["a"] == {"images": 1, "fp32_recall": 1.0, "int8_recall": 0.0}
    assert report["by_class"]["b"] == {"images": 2, "fp32_recall": 0.5, "int8_recall": 0.5}
    with pytest.raises(ValueError, match="no images"):
        quantization.compare(exact[:0], rounded[:0])


def test_accuracy_leaves_out_copies_of_calibration_images(labelled, tmp_path):
    root, _ = labelled
    (tmp_path / CLASSES[0]).mkdir()
    copies = sorted(root.rglob("*.png"))[:3]
    for path in copies:
        (tmp_path / CLASSES[0] / path.name).write_bytes(path.read_bytes())
    new = tmp_path / CLASSES[0] / "new.png"
    new.write_bytes(tools.encode(tools.make_pixels(60)[59]))
    files, judges, labels = export.split_images(root, tmp_path, CLASSES)
    assert judges == [new] and labels == [0] and len(files) == 48
    new.unlink()
    with pytest.raises(ValueError, match="no image that is not in --calibration"):
        export.split_images(root, tmp_path, CLASSES)


@pytest.mark.slow
def test_another_method_gives_other_ranges(exported, labelled, tmp_path, method="percentile"):
    images = tools.views(labelled[1][:23])  # no multiple of a batch
    counts = {}
    for name in ("minmax", method):
        counts[name] = quantization.quantize_static(
            exported[0] / "student.onnx", tmp_path / f"{name}.onnx", images, method=name
        )
    assert counts["minmax"] == counts[method] > 50
    assert (tmp_path / "minmax.onnx").read_bytes() != (tmp_path / f"{method}.onnx").read_bytes()


def test_quantize_refuses_nonsense(exported, tmp_path):
    source = exported[0] / "student.onnx"
    with pytest.raises(ValueError, match="no calibration images"):
        quantization.quantize_static(source, tmp_path / "x.onnx", np.zeros((0, 3, 32, 32)))
    with pytest.raises(ValueError, match="expected one of minmax"):
        quantization.quantize_static(
            source, tmp_path / "x.onnx", np.zeros((1, 3, 32, 32)), method="guess"
        )
    assert not list(tmp_path.iterdir())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--int8"], 2, "expected --calibration"),
        (["--calibration", "."], 2, "expected --int8"),
        (["--int8-method", "percentile"], 2, "expected --int8"),
        (["--int8", "--calibration", ".", "--format", "paddle"], 2, "expected --format onnx"),
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
    assert deploy_model.load_classifier(tmp_path / "a").runtime == "paddle"


def test_no_installer_runs_at_export_time(model, tmp_path, monkeypatch):
    """Paddle2ONNX's default optimizer calls pip by itself."""
    import os
    import subprocess

    def refuse(*words, **_):
        raise AssertionError(f"started {words}")

    for owner, name in ((subprocess, "Popen"), (subprocess, "run"), (os, "system")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.delenv("POLYGRAPHY_AUTOINSTALL_DEPS", raising=False)
    done = tools.call(export, model, tmp_path / "a", "--format", "onnx")
    assert done.code == 0, done.err
    assert "POLYGRAPHY_AUTOINSTALL_DEPS" not in os.environ


def test_a_folder_with_other_things_is_not_touched_and_an_old_export_is_replaced(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = tools.call(export, model, tmp_path, "--format", "paddle")
    assert done.code == 2 and "thesis.txt" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    for name in ("student-int8.onnx", "student.onnx"):
        (tmp_path / name).write_text("old")
    assert tools.call(export, model, tmp_path, "--format", "paddle").code == 0
    assert not list(tmp_path.glob("*.onnx"))


def test_a_network_that_gives_other_numbers_is_no_export(model, tmp_path, monkeypatch):
    real = deploy_model.onnx_network

    def wrong(path, **options):
        network = real(path, **options)
        return lambda images: network(images) * np.float32(1.01)

    monkeypatch.setattr(deploy_model, "onnx_network", wrong)
    done = tools.call(export, model, tmp_path / "a", "--format", "onnx")
    assert done.code == 1 and "differ from the model's" in done.err
    assert not (tmp_path / "a" / "model.json").exists()


def test_damaged_folders_are_refused_in_one_line(exported, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    facts = json.loads((copy / "model.json").read_text())

    def refused(match, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
            deploy_model.load_classifier(copy, **options)
        assert "\n" not in str(caught.value)

    refused("expected those of", categories=["a", "b", "c", "d"])
    (copy / "student.onnx").write_bytes(b"garbage")
    refused("ONNX Runtime cannot load it", runtime="onnx")
    (copy / "student.onnx").unlink()
    refused("no network for onnx,", runtime="onnx")
    assert deploy_model.load_classifier(copy).runtime == "paddle"
    for change in ({"format": "x/1"}, {"class_names": ["one"]}, {"mean": [0, 0]}, {"view": {}}):
        (copy / "model.json").write_text(json.dumps({**facts, **change}))
        refused("describes no model")
    (copy / "model.json").write_text("{")
    refused("describes no model")


def test_labels_come_from_folders(tmp_path):
    paths = [tmp_path / "b" / "1.png", tmp_path / "x" / "a" / "2.png"]
    assert deploy_images.labels_of(tmp_path, paths, ["a", "b"]) == [1, 0]
    assert deploy_images.labels_of(tmp_path, [*paths, tmp_path / "3.png"], ["a", "b"]) is None


def test_the_normalisation_is_the_core_s_bit_by_bit(model):
    from shared_core.for_paddle.data import Normalizer

    description = deploy_model.Description.of(load_model(model))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    expected = Normalizer(tools.MEAN, tools.STD)(pixels).numpy()
    assert np.array_equal(description.normalise(pixels), expected)


def test_onnx_needs_no_paddle_in_memory(exported):
    import subprocess

    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from visiondistill_gc import serve, deploy_model\n"
        "deploy_model.load_classifier(sys.argv[3], runtime='onnx')\n"
        "print('paddle' in sys.modules)"
    )
    roots = [tools.REPOSITORY / "packages", tools.REPOSITORY / "shared"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, roots), str(exported[0])],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr


def test_own_rounding_of_a_flat_and_of_a_steep_network():
    """A sum moves by about its last bit; a small difference of large numbers by far more."""
    import paddle

    class Net(paddle.nn.Layer):
        def __init__(self, share):
            super().__init__()
            self.linear, self.other = paddle.nn.Linear(12, 4), paddle.nn.Linear(12, 4)
            self.other.weight.set_value(self.linear.weight * share)

        def forward(self, images):
            return self.linear(images.flatten(1)) - self.other(images.flatten(1))

    images = np.random.default_rng(0).random((4, 3, 2, 2)).astype(np.float32)
    nets = [Net(0.0), Net(0.9999)]
    before = [net.linear.weight.numpy() for net in nets]
    flat, steep = (export.own_rounding(net, images) for net in nets)
    assert 1e-8 < flat < 1e-6 and steep > 1e-5
    assert all((net.linear.weight.numpy() == b).all() for net, b in zip(nets, before, strict=True))


def test_parity_is_refused_above_the_limit_and_for_what_is_no_number():
    ones = np.ones((1, 2))
    assert export.check_parity(ones, ones, "x", limit=1e-5) == 0
    for got in (ones * 1.1, ones * np.nan):
        with pytest.raises(ValueError, match="x: its logits differ from the model's by"):
            export.check_parity(ones, got, "x", limit=1e-5)
