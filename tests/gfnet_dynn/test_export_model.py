"""export_model.py writes what predict.py runs with the same decisions, and reports the truth."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import cv2
import numpy as np
import pytest
import torch

from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from shared_core import checkpoints
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.runs import run_command

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gfnet_dynn import export_model, predict  # noqa: E402
from gfnet_dynn.finished_model import OnnxClassifier, TorchClassifier  # noqa: E402

CLASSES = ("a", "b", "c")
SIZE = 16


def call(main, *words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_command(main, [str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    backbone = GFNet(img_size=SIZE, patch_size=4, num_classes=3, embed_dim=16, depth=2)
    model = GFNetDynn(backbone, (0,), gate_init="torch")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def save(path, model):
    facts = checkpoints.make_facts(
        project="gfnet_dynn",
        architecture=type(model).__name__,
        class_names=CLASSES,
        framework="torch",
        input_size=(3, SIZE, SIZE),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        split_hash="a" * 64,
        config={"crop_pct": 1.0, "train_interpolation": "bilinear"},
        model=model.config(),
    )
    save_checkpoint(path, model.state_dict(), facts)
    return path


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "exits.pth", model), save(folder / "student.pth", model.backbone)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of which the models know the names."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for index in range(14):
            noise = rng.normal(0, 1, (SIZE, SIZE, 3)) * rng.uniform(2, 90)
            pixels = np.clip(rng.integers(0, 256, 3) + 20 * label + noise, 0, 255)
            data = cv2.imencode(".png", pixels.astype(np.uint8))[1].tobytes()
            (root / name / f"{index}.png").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def threshold(files, images):
    """Half of the images leave, and none of them is near the threshold."""
    source = TorchClassifier(files[0])
    every, _ = export_model.load_images(source.description, images)
    with torch.no_grad():
        p = torch.softmax(source.model(torch.from_numpy(every)).logits[0], 1)
    scores = np.sort(p.amax(1).double().numpy())
    return float((scores[20] + scores[21]) / 2)


@pytest.fixture(scope="module")
def chain(files, images, threshold, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "a chain"
    words = ("--policy", "max_prob", "--threshold", threshold, "--calibration", images)
    code, out, err = call(export_model.main, files[0], folder, *words)
    assert code == 0, err
    return folder, out


@pytest.mark.slow
def test_description_of_a_chain(chain, model, threshold):
    folder, out = chain
    facts = json.loads((folder / "model.json").read_text())
    assert facts["class_names"] == list(CLASSES) and facts["input_size"] == [SIZE, SIZE]
    assert facts["mean"] == [0.4, 0.5, 0.6] and facts["std"] == [0.2, 0.25, 0.3]
    assert facts["crop_pct"] == 1.0 and facts["interpolation"] == "bilinear"
    assert facts["exits"] == [0] and facts["costs"] == model.exit_costs().tolist()
    assert ExitPolicy.from_state(facts["policy"]) == ExitPolicy("max_prob", threshold)
    assert facts["parity"]["images"] == 42 and facts["parity"]["max_abs_difference"] < 1e-4
    assert facts["parity"]["equal_decisions"] == {"default": 42}
    assert "default: 42 of 42 decisions equal" in out
    assert "logits differ by at most" in out
    first = onnx.load(str(folder / "segment0.onnx"))
    assert {o.version for o in first.opset_import if o.domain == ""} == {facts["opset"]}


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--no-exits",), ("--policy", "gate", "--threshold", "0.4")])
def test_predict_says_the_same_of_both(chain, files, images, threshold, tmp_path, words):
    own = words or ("--policy", "max_prob", "--threshold", threshold)
    for target, path, more in ((tmp_path / "t", files[0], own), (tmp_path / "o", chain[0], words)):
        assert call(predict.main, path, images, "--batch", 8, "--json", target, *more)[0] == 0
    torch_rows, onnx_rows = (json.loads((tmp_path / n).read_text())["images"] for n in "to")
    for name in ("path", "class", "exit_index", "exit_block"):
        assert [row[name] for row in torch_rows] == [row[name] for row in onnx_rows]
    a, b = ([row["probability"] for row in rows] for rows in (torch_rows, onnx_rows))
    assert a == pytest.approx(b, abs=1e-5)
    if not words:
        assert {row["exit_index"] for row in onnx_rows} == {0, 1}


@pytest.mark.slow
def test_int8_chain_and_its_report(files, images, threshold, chain, tmp_path):
    words = ("--policy", "max_prob", "--threshold", threshold, "--calibration", images)
    code, out, err = call(export_model.main, files[0], tmp_path / "q", *words, "--int8")
    assert code == 0, err
    facts = json.loads((tmp_path / "q" / "model.json").read_text())
    assert facts["int8"] == "static"
    for name in ("segment0.onnx", "segment1.onnx"):
        stored = onnx.load(str(tmp_path / "q" / name)).graph.initializer
        assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in stored}
    # The report once more, by hand, on every second image.
    every, labels = export_model.load_images(OnnxClassifier(chain[0]).description, images)
    policy = ExitPolicy("max_prob", threshold)
    held, truth = torch.from_numpy(np.ascontiguousarray(every[::2])), labels[::2]
    exact = TorchClassifier(files[0]).classify(held, policy)
    rounded = OnnxClassifier(tmp_path / "q").classify(held, policy)
    report = facts["int8_report"]
    assert report["images"] == 21
    assert report["same_class"] == (exact[0].argmax(1) == rounded[0].argmax(1)).mean() >= 0.9
    assert report["same_exit"] == (exact[1] == rounded[1]).mean() >= 0.9
    assert report["float_accuracy"] == pytest.approx((exact[0].argmax(1) == truth).mean())
    assert report["int8_accuracy"] == pytest.approx((rounded[0].argmax(1) == truth).mean())
    assert np.abs(exact[0] - rounded[0]).max() > 1e-5  # it really is another file
    assert f"same class {100 * report['same_class']:.1f} %" in out


@pytest.mark.slow
def test_plain_model_dynamic_int8_and_a_second_export_into_the_folder(files, images, tmp_path):
    folder = tmp_path / "plain"
    code, out, err = call(export_model.main, files[1], folder, "--int8", "--opset", 20)
    assert code == 0, err
    assert "give real ones by --calibration" in out and "int8 (dynamic)" in out
    facts = json.loads((folder / "model.json").read_text())
    assert facts["file"] == "model-int8.onnx" and facts["opset"] == 20
    assert facts["parity"]["equal_decisions"] == {"plain": facts["parity"]["images"]}
    target = tmp_path / "o.json"
    assert call(predict.main, folder, images, "--json", target)[0] == 0
    assert {row["exit_block"] for row in json.loads(target.read_text())["images"]} == {None}
    code, out, err = call(predict.main, folder, images, "--policy-point", "fast")
    assert code == 2 and "has no exits" in err
    code, out, err = call(export_model.main, files[1], folder)  # an earlier export is replaced
    assert code == 0 and sorted(p.name for p in folder.iterdir()) == ["model.json", "model.onnx"]
    (folder / "model.onnx").unlink()
    code, out, err = call(predict.main, folder, images)
    assert code == 1 and "model.onnx is missing" in err and err.count("\n") == 1


@pytest.mark.slow
def test_without_thresholds_predict_wants_them(files, images, tmp_path):
    code, out, err = call(export_model.main, files[0], tmp_path / "c")
    assert code == 0 and "predict.py will want --policy KIND --threshold T" in out
    code, out, err = call(predict.main, tmp_path / "c", images)
    assert code == 2 and "expected --policy KIND --threshold T" in err
    assert call(predict.main, tmp_path / "c", images, "--no-exits")[0] == 0


class Altered:
    """A classifier whose logits of one exit are off, and whose exits may be."""

    def __init__(self, source, *, exit_index, by, swap=()):
        self.description, self.full_cost = source.description, source.full_cost
        self.source, self.exit_index, self.by, self.swap = source, exit_index, by, swap

    def classify(self, images, policy):
        logits, left = self.source.classify(images, policy)
        logits = logits.copy()
        logits[left == self.exit_index] += self.by
        if self.swap and 0 < min(policy.thresholds) and max(policy.thresholds) <= 1:
            left = left.copy()
            left[list(self.swap)] = 1 - left[list(self.swap)]
        return logits, left


@pytest.mark.parametrize("exit_index", [0, 1])
def test_parity_sees_a_difference_at_any_exit(files, images, threshold, exit_index):
    source = TorchClassifier(files[0])
    every, _ = export_model.load_images(source.description, images)
    policies = {"p": ExitPolicy("max_prob", threshold)}
    same = export_model.check_parity(source, source, every, policies)
    assert same == {"images": 42, "max_abs_difference": 0.0, "equal_decisions": {"p": 42}}
    other = Altered(source, exit_index=exit_index, by=np.float32(0.125), swap=(3, 5))
    found = export_model.check_parity(source, other, every, policies)
    assert found["max_abs_difference"] == pytest.approx(0.125, abs=1e-6)
    assert found["equal_decisions"] == {"p": 42 - 2 * 2}  # 2 in each of 2 batches


def test_int8_report_by_hand():
    exact = np.eye(3)[[0, 1, 2, 0]], np.array([0, 0, 1, 1])
    rounded = np.eye(3)[[0, 1, 1, 0]], np.array([0, 1, 1, 1])
    report = export_model.compare_int8(exact, rounded, np.array([0, 1, 2, 2]), (1.0, 4.0))
    assert report == {
        "images": 4,
        "same_class": 0.75,
        "same_exit": 0.75,
        "float_cost_fraction": 10 / 16,
        "int8_cost_fraction": 13 / 16,
        "float_accuracy": 0.75,
        "int8_accuracy": 0.5,
    }


def test_generated_images_and_labels(files, images, tmp_path):
    description = TorchClassifier(files[1]).description
    first, labels = export_model.load_images(description, None)
    assert labels is None and np.array_equal(first, export_model.load_images(description, None)[0])
    assert first.dtype == np.float32 and first.shape[1:] == (3, SIZE, SIZE)
    _, labels = export_model.load_images(description, images)
    assert np.bincount(labels).tolist() == [14, 14, 14]
    _, labels = export_model.load_images(description, images / "a")  # no class folder below it
    assert labels is None


def test_errors_are_one_line(files, images, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "one").mkdir()
    (tmp_path / "bad").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "bad" / name).write_bytes(b"nothing")
    for words, code, message in (
        ((files[1], tmp_path / "mine"), 2, "holds thesis.txt, which no export wrote"),
        ((files[1], files[0]), 2, "is a file, expected a folder"),
        ((files[1], tmp_path / "x", "--opset", 12), 2, "expected 13 or more"),
        ((files[1], tmp_path / "x", "--policy-point", "fast"), 2, "has no exits"),
        ((files[0], tmp_path / "x", "--policy-point", "fast"), 2, "no record of its run"),
        ((files[1], tmp_path / "x", "--calibration", tmp_path / "no"), 1, "is not a folder"),
        ((files[1], tmp_path / "x", "--calibration", tmp_path / "one"), 1, "no image in this"),
        ((files[1], tmp_path / "x", "--calibration", tmp_path / "bad"), 1, "not a JPEG"),
        ((tmp_path / "no.pth", tmp_path / "x"), 1, "no.pth"),
        ((tmp_path, tmp_path / "x"), 2, "is a folder, expected a .pth file"),
    ):
        got, out, err = call(export_model.main, *words)
        assert got == code and message in err and err.count("\n") == 1, (words, err)
    assert (tmp_path / "mine" / "thesis.txt").exists() and not (tmp_path / "x").exists()
