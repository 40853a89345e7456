"""Export, parity, int8: the student alone, with its embedding as output."""

import json

import cv2
import numpy as np
import pytest
import torch

from landmark_distill import embed, export_model
from landmark_distill.compare_int8 import compare_features
from landmark_distill.embedder import ExportedEmbedder, TorchEmbedder, load_embedder
from landmark_distill.model import build_model
from landmark_distill.model_files import save_model
from shared_core.for_torch.export import ExportError
from shared_core.runs import run_command

NETWORKS = {
    "Resnet12": {"feature_dim": 16, "options": {}},
    "Swin_tiny": {
        "feature_dim": 32,
        "options": {"depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2], "window": 2},
    },
}


def _save(path, name, size=32):
    torch.manual_seed(1)
    chosen = NETWORKS[name]
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in chosen["options"].items()
    }
    model = build_model(name, image_size=size, feature_dim=chosen["feature_dim"], **options).eval()
    network = {"name": name, "image_size": size, "scale": 32.0, "margin": 0.1, **chosen}
    weights = {**model.state_dict(), "teacher.encoder.big": torch.zeros(3)}
    save_model(
        path, weights, network=network, class_names=[], epoch=1, metrics={}, split_hash=None,
        config={}, bgr=False, resize="linear",
    )  # fmt: skip
    return model


def _folders(root, classes=6, each=6):
    rng = np.random.default_rng(0)
    for n in range(classes):
        folder = root / f"c{n}"
        folder.mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for i in range(each):
            noisy = np.clip(colour + rng.normal(0, 20, (36, 36, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / f"{i}.png"), noisy)
    return root


@pytest.fixture(
    scope="module", params=["Resnet12", pytest.param("Swin_tiny", marks=pytest.mark.slow)]
)
def exported(request, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    root = tmp_path_factory.mktemp("deploy")
    model = _save(root / "max_acc.pth", request.param)
    images = _folders(root / "images")
    words = [str(root / "max_acc.pth"), str(root / "out"), "--int8", "--calibration", str(images)]
    assert run_command(export_model.main, words) == 0
    return root, model, request.param


def test_every_exported_network_gives_the_students_embedding(exported):
    root, model, _ = exported
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model.embed(images).double(), dim=1).numpy()
    for file in ("student.onnx", "student.pt2"):
        for count in (1, 5):
            got = load_embedder(root / "out" / file)(images[:count])
            np.testing.assert_allclose(got, wanted[:count], atol=2e-5)
    rough = load_embedder(root / "out" / "student_int8.onnx")
    got = rough(images)
    assert 0.8 < (got * wanted).sum(1).min() < 1 - 1e-7
    assert rough.weights.endswith("-int8")
    assert "teacher" not in repr(torch.export.load(root / "out" / "student.pt2").state_dict.keys())


def test_the_description_says_what_was_done_and_what_int8_costs(exported):
    root, _, name = exported
    facts = json.loads((root / "out" / "model.json").read_text())
    assert facts["architecture"] == name and facts["sight"]["size"] == 32
    assert facts["parity"]["onnx"] < 1e-4 and facts["parity"]["program"] < 1e-4
    int8 = facts["int8"]
    assert int8["layers"] >= 8
    report = int8["report"]
    assert report["images"] == 18 and 0.5 < report["cosine_mean"] <= 1
    assert report["bytes"]["int8"] < report["bytes"]["float"]
    assert set(report["truths"]) == {"fine"}
    fine = report["truths"]["fine"]
    assert len(fine["float"]["rates"]) == len(fine["int8"]["rates"]) == len(fine["far_targets"])
    assert 0 <= fine["int8"]["recall_at_1"] <= 1


def test_int8_is_int8_in_the_file(exported):
    import onnx

    root, _, _ = exported
    graph = onnx.load(str(root / "out" / "student_int8.onnx")).graph
    kinds = {onnx.TensorProto.INT8}
    assert any(t.data_type in kinds and len(t.dims) >= 2 for t in graph.initializer)


def test_embed_takes_an_export_like_the_model_file(exported, tmp_path):
    root, _, _ = exported
    for model, out in ((root / "max_acc.pth", "a.npy"), (root / "out", "b.npy")):
        words = [str(model), str(root / "images"), str(tmp_path / out), "--device", "cpu"]
        assert run_command(embed.main, words) == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=2e-5)
    assert ExportedEmbedder(root / "out").weights == TorchEmbedder(root / "max_acc.pth").weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model file that nothing was exported from yet."""
    root = tmp_path_factory.mktemp("small")
    _save(root / "max_acc.pth", "Resnet12")
    return root


def test_an_export_replaces_an_earlier_one_and_nothing_else(small, tmp_path, capsys):
    out = tmp_path / "o"
    out.mkdir()
    for name in ("student.onnx", "student_int8.onnx", "model.json"):
        (out / name).write_text("of an earlier export")
    words = [str(small / "max_acc.pth"), str(out), "--format", "program"]
    assert run_command(export_model.main, words) == 0
    assert sorted(p.name for p in out.iterdir()) == ["model.json", "student.pt2"]
    images = torch.randn(2, 3, 32, 32)
    wanted = TorchEmbedder(small / "max_acc.pth")(images)
    np.testing.assert_allclose(load_embedder(out)(images), wanted, atol=2e-5)
    (out / "mine.txt").write_text("keep")
    capsys.readouterr()
    assert run_command(export_model.main, words) == 2
    assert "holds mine.txt, which no export wrote" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep" and (out / "student.pt2").exists()


def test_a_program_that_differs_is_refused(tmp_path):
    class Odd(torch.nn.Module):
        calls = 0

        def forward(self, image):
            Odd.calls += 1
            return image.flatten(1) * Odd.calls

    with pytest.raises(ExportError, match="the program differs"):
        export_model.export_program(Odd(), tmp_path / "x.pt2", input_size=(3, 4, 4))
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--int8"], 2, "expected both"),
        (["--calibration", "{images}"], 2, "expected both"),
        (["--int8", "--calibration", "{none}"], 1, "is not a folder"),
        (["--int8", "--calibration", "{empty}"], 1, "expected four or more"),
        (["--int8", "--calibration", "{images}", "--format", "program"], 2, "--format onnx"),
        (["--opset", "11"], 2, "expected 18 or more"),
    ],
)
def test_bad_words_are_one_line_before_anything_is_written(
    small, tmp_path, capsys, words, code, message
):
    root = small
    (tmp_path / "empty").mkdir()
    places = {
        "{images}": root, "{none}": tmp_path / "none", "{empty}": tmp_path / "empty",
    }  # fmt: skip
    arguments = [str(root / "max_acc.pth"), str(tmp_path / "o")]
    assert run_command(
        export_model.main, arguments + [str(places.get(w, w)) for w in words]
    ) == code  # fmt: skip
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_the_comparison_leaves_out_what_so_few_images_cannot_say():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.repeat(np.arange(10), 4)
    report = compare_features(rows, rows, {"fine": labels, "one": np.zeros(40, np.int64)})
    assert set(report["truths"]) == {"fine"}  # one class only has no impostor pair
    assert report["truths"]["fine"]["far_targets"] == [0.1, 0.01]  # of 720 impostor pairs
    assert report["truths"]["fine"]["float"] == report["truths"]["fine"]["int8"]
    assert report["cosine_min"] == pytest.approx(1)
    with pytest.raises(ValueError, match="shapes"):
        compare_features(rows, rows[:3], None)
