"""Export, int8: the student alone as a model folder, which every command of the core opens."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from command_tools import run_main
from landmark_distill import embed, export_model, model_folder
from landmark_distill.config import NetworkConfig, ViewConfig
from landmark_distill.gallery.embedder import load_embedder
from landmark_distill.gallery.features import weights_of
from landmark_distill.judging.retrieval import retrieval
from landmark_distill.model_files import build, load_model, save_model
from shared_core.datasets import Manifest
from shared_core.datasets.finding.fingerprint import content_key
from shared_core.datasets.splitting.manifest import Entry, sorted_entries
from shared_core.deploy.facts import read_facts
from shared_core.deploy.predictor import open_model
from shared_core.smallvision import main as smallvision

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
TINY = {"depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "window": 2}
NETWORKS = {
    "Resnet12": NetworkConfig("Resnet12", 32, 16),
    "Swin_tiny": NetworkConfig("Swin_tiny", 32, 32, options=TINY),
}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def _save(path, name, *, bgr=False):
    torch.manual_seed(1)
    network = NETWORKS[name]
    model = build(network, num_classes=None).eval()
    weights = {**model.state_dict(), "teacher.encoder.big": torch.zeros(3)}
    save_model(
        path, weights, network=network, class_names=["a"], epoch=1, metrics={}, split_hash=None,
        config={}, views=ViewConfig(network.image_size, bgr=bgr), start={},
    )  # fmt: skip
    return model


def _folders(root, classes=6, each=12):
    rng = np.random.default_rng(0)
    for n in range(classes):
        folder = root / f"c{n}"
        folder.mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for i in range(each):
            noisy = np.clip(colour + rng.normal(0, 20, (36, 36, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / f"{i}.png"), noisy)
    return root


def _wanted(model, images, *, bgr=False):
    """What the network itself says of uint8 images, by NumPy and torch alone."""
    pixels = (images / 255 - MEAN) / STD
    pixels = pixels[..., ::-1] if bgr else pixels
    tensor = torch.tensor(pixels.transpose(0, 3, 1, 2).copy(), dtype=torch.float32)
    with torch.no_grad():
        return torch.nn.functional.normalize(model.embed(tensor).double(), dim=1).numpy()


@pytest.fixture(scope="module", params=["Resnet12", "Swin_tiny"])
def exported(request, tmp_path_factory):
    """A model folder; the ResNet sees blue first, so that the order of channels is tested, too."""
    root = tmp_path_factory.mktemp("deploy")
    bgr = request.param == "Resnet12"
    model = _save(root / "max_acc.pth", request.param, bgr=bgr)
    images = _folders(root / "images")
    words = [root / "max_acc.pth", root / "out", "--int8", "yes", "--max-accuracy-loss", "1",
             "--calibration", images]  # fmt: skip
    done = run_main(export_model.main, words)
    assert done.code == 0, done.err
    return root, model, bgr, done.out


def test_every_file_gives_the_students_embedding(exported):
    root, model, bgr, _ = exported
    images = np.random.default_rng(2).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    wanted = _wanted(model, images, bgr=bgr)
    for file in ("model.onnx", "model.pt2", "."):
        for count in (1, 5):
            got = load_embedder(root / "out" / file).probabilities(images[:count])
            if file != ".":  # the folder's own default may be int8
                np.testing.assert_allclose(got, wanted[:count], atol=2e-5)
    rough = load_embedder(root / "out" / "model.int8.onnx")
    assert 0.8 < (rough.probabilities(images) * wanted).sum(1).min() < 1 - 1e-7
    assert weights_of(rough).endswith("-int8")
    program = torch.export.load(root / "out" / "model.pt2")
    found = program.module()(torch.from_numpy(images)).detach()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert "teacher" not in repr(program.state_dict.keys())


def test_the_description_says_what_was_done_and_what_int8_costs(exported):
    root, model, bgr, said = exported
    facts = read_facts(root / "out")
    assert (facts.task, facts.activation, facts.class_names) == ("embed", "unit", ())
    assert facts.bgr is bgr and facts.input_size == (32, 32) and facts.project == "landmark_distill"
    assert facts.costs["parameters"] == sum(p.numel() for p in model.encoder.parameters())
    _, stored = load_model(root / "max_acc.pth")
    assert facts.provenance["checkpoint_sha256"] == stored["sha256"]
    assert facts.measured["int8"]["layers"] >= 8
    # What is said of int8 is what the file itself does to the images that judged it.
    order = np.random.default_rng(0).permutation(72)
    files = sorted((root / "images").rglob("*.png"))
    judges = [files[i] for i in order[::2]]
    pixels = np.stack([cv2.resize(cv2.imread(str(p))[..., ::-1], (32, 32)) for p in judges])
    labels = np.array([int(p.parent.name[1:]) for p in judges])
    for runtime in ("onnx", "onnx-int8"):
        rows = open_model(root / "out", runtime=runtime).probabilities(pixels)
        recall = retrieval(rows, labels, ks=(1,)).recall[1]
        open_set = facts.measured["open_set"][runtime]
        assert open_set["retrieval"]["fine"]["recall_at_1"] == pytest.approx(recall)
        assert f"{runtime}, fine: recall@1 {recall:.4f}" in said
        score = "float_score" if runtime == "onnx" else "int8_score"
        assert facts.measured["int8"][score] == pytest.approx(recall)


def test_int8_is_int8_in_the_file(exported):
    import onnx

    graph = onnx.load(str(exported[0] / "out" / "model.int8.onnx")).graph
    kinds = {onnx.TensorProto.INT8}
    assert any(t.data_type in kinds and len(t.dims) >= 2 for t in graph.initializer)


def test_embed_takes_a_folder_like_the_model_file(exported, tmp_path):
    root, _, _, _ = exported
    for model, out in (
        (root / "max_acc.pth", "a.npy"), (root / "out" / "model.onnx", "b.npy"),
    ):  # fmt: skip
        words = [model, root / "images", tmp_path / out, "--device", "cpu"]
        assert run_main(embed.main, words).code == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=2e-5)
    facts = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert facts[0]["weights"] == facts[1]["weights"]


def test_the_cores_own_commands_open_the_folder(exported, tmp_path):
    root, model, bgr, _ = exported
    shutil.copytree(root / "out", tmp_path / "elsewhere")  # nothing hangs on the place
    done = run_main(smallvision, ["predict", tmp_path / "elsewhere", root / "images" / "c0",
                                  "--json", tmp_path / "p.json", "--runtime", "onnx"])  # fmt: skip
    assert done.code == 0, done.err
    answers = json.loads((tmp_path / "p.json").read_text())
    assert "feature" in json.dumps(answers)
    done = run_main(smallvision, ["evaluate", tmp_path / "elsewhere", root / "images",
                                  "--json", tmp_path / "e.json"])  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "e.json").read_text())["task"] == "embed"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model file that nothing was exported from yet."""
    root = tmp_path_factory.mktemp("small")
    _save(root / "max_acc.pth", "Resnet12")
    return root


def test_an_export_replaces_an_earlier_one_and_nothing_else(small, tmp_path):
    out = tmp_path / "o"
    words = [small / "max_acc.pth", out, "--format", "program"]
    assert run_main(export_model.main, words).code == 0
    first = sorted(p.name for p in out.iterdir())
    assert first == ["README.md", "model.json", "model.pt2"]
    assert run_main(export_model.main, words).code == 0
    assert sorted(p.name for p in out.iterdir()) == first
    (out / "mine.txt").write_text("keep")
    done = run_main(export_model.main, words)
    assert done.code == 2 and "mine.txt" in done.err
    assert (out / "mine.txt").read_text() == "keep" and (out / "model.pt2").exists()


def test_a_file_that_answers_otherwise_ends_the_export(small, tmp_path, monkeypatch):
    class Other(model_folder.Program):
        def forward(self, images):
            return super().forward(255 - images)

    monkeypatch.setattr(model_folder, "Program", Other)
    done = run_main(export_model.main, [small / "max_acc.pth", tmp_path / "o"])
    assert done.code == 1 and "model.pt2 does not answer as its network" in done.err
    assert not (tmp_path / "o").exists()


def test_the_run_of_the_file_judges_and_calibrates(finished_run, landmark, tmp_path):
    """All images of the test part, and those of calibration, as the run's split.json says."""
    done = run_main(
        export_model.main,
        [finished_run / "max_acc.pth", tmp_path / "o", "--format", "onnx", "--int8", "yes",
         "--max-accuracy-loss", "1"],
    )  # fmt: skip
    assert done.code == 0, done.err
    split = json.loads((finished_run / "split.json").read_text())["samples"]
    count = sum(part == "test" for _, _, _, part in split)
    facts = read_facts(tmp_path / "o")
    assert facts.measured["files"]["onnx"]["agreement"]["images"] == count
    assert facts.measured["open_set"]["images"] == count
    # So few calibration images of a class say nothing by recall: the cosine judges.
    assert 0.9 < facts.measured["int8"]["int8_score"] < facts.measured["int8"]["float_score"]
    assert facts.measured["int8"]["float_score"] == pytest.approx(1)
    # The file that is shipped gives the rates that the run's test has found.
    rates = json.loads((finished_run / "openset.json").read_text())["rates"]
    for name, row in facts.measured["open_set"]["onnx"]["rates"].items():
        assert row == pytest.approx(rates[name], abs=0.03)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--calibration", "{images}"], 2, "expected both"),
        (["--int8", "--calibration", "{none}"], 1, "is not a folder"),
        (["--int8", "--calibration", "{empty}"], 1, "expected four or more"),
        (["--int8"], 2, "expected --calibration FOLDER"),
        (["--int8", "--calibration", "{images}", "--format", "program"], 2, "--format onnx"),
        (["--opset", "11"], 2, "expected [18"),
        (["--data-path", "{empty}"], 2, "expected the split of the run"),
    ],
)
def test_bad_words_are_one_line_before_anything_is_written(small, tmp_path, words, code, message):
    (tmp_path / "empty").mkdir()
    places = {
        "{images}": small, "{none}": tmp_path / "none", "{empty}": tmp_path / "empty",
    }  # fmt: skip
    arguments = [small / "max_acc.pth", tmp_path / "o", *[places.get(w, w) for w in words]]
    done = run_main(export_model.main, arguments)
    assert done.code == code and message in done.err, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def _closed_split(root, file):
    """Each class in each part: nothing is unseen."""
    parts = ["train"] * 6 + ["calibration"] * 3 + ["test"] * 3
    entries = [
        Entry(f"c{n}/{i}.png", n, content_key(root / f"c{n}" / f"{i}.png"), parts[i])
        for n in range(6)
        for i in range(12)
    ]
    split = Manifest("layout", tuple(f"c{n}" for n in range(6)), (), 0, sorted_entries(entries))
    split.write(file)
    return split


def test_a_closed_split_is_learned_and_becomes_a_classifier(tmp_path, landmark):
    """As any other classifier of a user's folder: a trained body, and no class apart."""
    root, run = _folders(tmp_path / "images"), tmp_path / "run"
    split = _closed_split(root, tmp_path / "split.json")
    shared = ("--data-path", root, "--split", tmp_path / "split.json", "--continue")
    done = landmark(
        *shared, "--output", run, "--input-size", "32", "--epochs", "1", "--batch-size", "16",
        "--seed", "0", "--threads", "1", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads((run / "result.json").read_text())
    assert record["data"]["splits"] == {"train": 36, "calibration": 18, "test": 18}
    assert record["data"]["classes"] == 6 and record["measured"]["start"]["name"]
    assert not any("recall_at_1" in line for line in (run / "metrics.jsonl").open())
    words = [run / "max_acc.pth", tmp_path / "model", "--format", "onnx", "--data-path", root]
    done = run_main(export_model.main, [*words, "--class-means", tmp_path / "split.json"])
    assert done.code == 0, done.err
    facts = read_facts(tmp_path / "model")
    assert facts.class_names == split.classes and set(facts.files) == {"onnx"}
    assert facts.measured["files"]["onnx"]["accuracy"]["value"] > 0.8


def test_class_means_behind_the_features_name_classes(tmp_path):
    model = _save(tmp_path / "max_acc.pth", "Resnet12")
    root = _folders(tmp_path / "images")
    split = _closed_split(root, tmp_path / "split.json")
    words = [tmp_path / "max_acc.pth", tmp_path / "out", "--class-means", tmp_path / "split.json"]
    done = run_main(export_model.main, [*words, "--data-path", root])
    assert done.code == 0, done.err

    def part(name):
        items = split.subset(name)
        pixels = [cv2.resize(cv2.imread(str(root / i.path))[..., ::-1], (32, 32)) for i in items]
        return np.stack(pixels), np.array([i.label for i in items])

    pixels, labels = part("train")
    rows = _wanted(model, pixels)
    means = np.stack([rows[labels == n].sum(0) for n in range(6)])
    means *= 32 / np.linalg.norm(means, axis=1, keepdims=True)
    pixels, labels = part("calibration")
    cosines = _wanted(model, pixels) @ means.T

    def cost(log_t):
        z = cosines / np.exp(log_t)
        return -(z[np.arange(len(z)), labels] - np.log(np.exp(z).sum(1))).mean()

    best = np.exp(minimize_scalar(cost, bounds=(-4, 6), method="bounded").x)
    facts = read_facts(tmp_path / "out")
    assert (facts.task, facts.class_names) == ("classify", split.classes)
    assert facts.temperature == pytest.approx(best, rel=1e-3)
    pixels, labels = part("test")
    z = _wanted(model, pixels) @ means.T / facts.temperature
    wanted = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    got = open_model(tmp_path / "out").probabilities(pixels)
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    accuracy = facts.measured["files"]["onnx"]["accuracy"]
    assert accuracy["images"] == 18
    assert accuracy["value"] == pytest.approx((wanted.argmax(1) == labels).mean())
    # A folder alone: every fifth image fits the temperature, none judges.
    words = [tmp_path / "max_acc.pth", tmp_path / "folder", "--class-means", root]
    done = run_main(export_model.main, words)
    assert done.code == 0 and read_facts(tmp_path / "folder").class_names == split.classes
    assert read_facts(tmp_path / "folder").more["class_means"] == 60
