"""Model files and folders answer as a plain forward pass does, at the exit that scores decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from command_tools import run_main
from gfnet_dynn import export_model, predict
from gfnet_dynn.choices import RULES
from gfnet_dynn.model_files import add_policies
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from shared_core import checkpoints
from shared_core.datasets import Manifest
from shared_core.deploy.facts import read_facts
from shared_core.deploy.options import ExitOptions
from shared_core.deploy.predictor import open_model
from shared_core.for_torch.checkpoints import save_checkpoint

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gfnet_dynn.deploy.checkpoint import open_checkpoint  # noqa: E402
from gfnet_dynn.deploy.segments import write_float  # noqa: E402

CLASSES = ("harbour", "beach", "pond", "field")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)  # not ImageNet's: they must come from the file
TEMPERATURES = (0.5, 2.0, 0.8)
SIZE = 16
QUICK = ("--opset", 17)  # by torch's older exporter, which takes a tenth of the time


def call(command, *words):
    return run_main(command.main, words)


def build(seed=0) -> GFNetDynn:
    torch.manual_seed(seed)
    backbone = GFNet(img_size=SIZE, patch_size=4, num_classes=4, embed_dim=12, depth=3)
    model = GFNetDynn(backbone, (0, 1), gate_init="torch")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def save(path: Path, model, *, crop_pct=1.0) -> Path:
    facts = checkpoints.make_facts(
        project="gfnet_dynn",
        architecture=type(model).__name__,
        class_names=CLASSES,
        framework="torch",
        input_size=(3, SIZE, SIZE),
        mean=MEAN,
        std=STD,
        split_hash="a" * 64,
        config={"crop_pct": crop_pct, "train_interpolation": "bicubic"},
        model=model.config(),
    )
    save_checkpoint(path, model.state_dict(), facts)
    return path


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (9, 1, 1, 3))
    noise = rng.normal(0, 1, (9, SIZE, SIZE, 3)) * rng.uniform(5, 90, (9, 1, 1, 1))
    return np.clip(base + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory, pixels) -> Path:
    root = tmp_path_factory.mktemp("some images")  # a blank in the path
    for index, one in enumerate(pixels):
        (root / f"{index}.png").write_bytes(cv2.imencode(".png", one[..., ::-1])[1].tobytes())
    return root


def network_input(pixels) -> torch.Tensor:
    x = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    return torch.from_numpy(x)


@pytest.fixture(scope="module")
def truth(pixels):
    """Calibrated probabilities (G+1, N, K) in float64, of a plain pass of every head."""
    with torch.no_grad():
        logits = [z.double().numpy() for z in build()(network_input(pixels)).logits]
    scaled = [z / t for z, t in zip(logits, TEMPERATURES, strict=True)]
    e = [np.exp(z - z.max(1, keepdims=True)) for z in scaled]
    return np.stack([one / one.sum(1, keepdims=True) for one in e])


def first_exit(p, threshold):
    return np.array(
        [next((e for e in (0, 1) if p[e, n].max() >= threshold), 2) for n in range(p.shape[1])]
    )


@pytest.fixture(scope="module")
def thresholds(truth) -> dict[str, float]:
    """Three wishes with different exits, none near a score."""
    scores = np.sort(truth[:2].max(axis=2).ravel())
    found = [(scores[i] + scores[i + 1]) / 2 for i in (15, 10, 4)]
    assert all(np.abs(scores - t).min() > 1e-4 for t in found)
    assert len({tuple(first_exit(truth, t)) for t in found}) == 3
    return dict(zip(("careful", "balanced", "fast"), map(float, found), strict=True))


@pytest.fixture(scope="module")
def files(tmp_path_factory, thresholds) -> dict[str, Path]:
    """A model with its thresholds, one without, and a plain network."""
    folder, model = tmp_path_factory.mktemp("models"), build()
    bare = save(folder / "bare.pth", model)
    points = {n: ExitPolicy("max_prob", t, TEMPERATURES) for n, t in thresholds.items()}
    rules = {"margin": ExitPolicy("margin", 0.25, TEMPERATURES)}
    add_policies(bare, points=points, rules=rules, target=folder / "exits.pth")
    plain = save(folder / "plain.pth", model.backbone)
    return {"bare": bare, "exits": folder / "exits.pth", "plain": plain}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, files) -> dict[str, Path]:
    """The same two, exported."""
    root = tmp_path_factory.mktemp("exported models")
    for name in ("exits", "plain"):
        done = call(export_model, files[name], root / name, *QUICK)
        assert done.code == 0, done.err
    return {name: root / name for name in ("exits", "plain")}


@pytest.mark.parametrize("form", ["file", "folder"])
def test_class_probability_exit_and_cost(files, folders, images, truth, thresholds, tmp_path, form):
    """Of every wish, asked in batches, by torch and by ONNX Runtime."""
    model = files["exits"] if form == "file" else folders["exits"]
    costs = build().exit_costs()
    for batch, point in ((1, None), (4, "careful"), (64, "balanced"), (2, "fast")):
        target = tmp_path / "out.json"
        words = () if point is None else ("--policy-point", point)
        done = call(predict, model, images, "--batch", batch, "--json", target, *words)
        assert done.code == 0 and done.err == ""
        left = first_exit(truth, thresholds[point or "balanced"])
        chosen = truth[left, np.arange(9)]
        content = json.loads(target.read_text())
        rows = content["images"]
        assert [Path(row["path"]).name for row in rows] == [f"{i}.png" for i in range(9)]
        assert [row["exit_index"] for row in rows] == left.tolist()
        assert [row["class"] for row in rows] == [CLASSES[k] for k in chosen.argmax(1)]
        assert [row["macs"] for row in rows] == costs[left].tolist()
        for row, p in zip(rows, chosen, strict=True):
            best = np.argsort(-p)[:3]
            assert [one["class"] for one in row["top"]] == [CLASSES[k] for k in best]
            assert [one["probability"] for one in row["top"]] == pytest.approx(p[best], abs=1e-5)
        fraction = costs[left].mean() / costs[-1]
        assert content["summary"]["macs_fraction"] == pytest.approx(fraction)
    lines = done.out.strip().splitlines()
    assert len(lines) == 10 and all(line.endswith(" ms") for line in lines[:-1])


@pytest.mark.parametrize("form", ["file", "folder"])
def test_other_rules_and_no_exits(files, folders, images, truth, tmp_path, form):
    model = files["exits"] if form == "file" else folders["exits"]
    p, target = np.sort(truth, axis=2), tmp_path / "o.json"
    margin = p[..., -1] - p[..., -2]
    for words, limits in (
        (("--threshold", "0.3,0.1"), (0.3, 0.1)),
        ((), (0.25, 0.25)),  # the balanced one of the file
    ):
        assert (
            call(predict, model, images, "--policy", "margin", *words, "--json", target).code == 0
        )
        left = [next((e for e in (0, 1) if margin[e, n] >= limits[e]), 2) for n in range(9)]
        assert [row["exit_index"] for row in json.loads(target.read_text())["images"]] == left
    assert call(predict, model, images, "--no-exits", "--json", target).code == 0
    rows = json.loads(target.read_text())["images"]
    assert [row["probability"] for row in rows] == pytest.approx(truth[-1].max(1), abs=1e-5)


def test_every_rule_decides_alike_in_every_runtime(folders, pixels):
    rng = np.random.default_rng(1)
    views = np.concatenate([np.roll(pixels, s, axis=1) for s in range(5)])
    chain, model = open_model(folders["exits"]), build()
    with torch.no_grad():
        full = model(network_input(views))
    for kind in RULES:
        scores = ExitPolicy(kind, 0.5, TEMPERATURES).scores(*full).double()
        # Between scores: a threshold that is a score would be met or missed by rounding.
        cut = torch.sort(scores.flatten().unique()).values
        middle = float(cut[len(cut) // 2 - 1] + cut[len(cut) // 2]) / 2
        options = ExitOptions(kind=kind, thresholds=(middle,))
        order = rng.permutation(len(views))
        found = chain.with_exits(options).outputs(views[order])
        wanted = ExitPolicy(kind, middle, TEMPERATURES).select(*full).numpy()
        assert np.array_equal(found.exits, wanted[order]) and len(set(wanted.tolist())) > 1


def test_plain_networks_and_the_crop_of_the_file(files, folders, images, pixels, tmp_path):
    with torch.no_grad():
        p = torch.softmax(build().backbone(network_input(pixels)), 1).numpy()
    for model in (files["plain"], folders["plain"]):
        target = tmp_path / "o.json"
        assert call(predict, model, images, "--json", target, "--top", 99).code == 0
        rows = json.loads(target.read_text())["images"]
        assert [row["probability"] for row in rows] == pytest.approx(p.max(1), abs=1e-5)
        assert all(len(row["top"]) == 4 and "exit_index" not in row for row in rows)
    half = save(tmp_path / "half.pth", build().backbone, crop_pct=0.5)
    wide = np.random.default_rng(1).integers(0, 256, (32, 40, 3)).astype(np.uint8)
    views = open_checkpoint(half).view(wide)  # short side 32 = 16 / 0.5
    np.testing.assert_array_equal(views, wide[8:24, 12:28])


@pytest.mark.parametrize("opset", [13, 18])
def test_files_are_matrix_products_of_the_opset_that_was_asked_for(tmp_path, pixels, opset):
    model, x = build(), network_input(pixels)
    model.backbone.set_filter("fft")  # the files must not depend on the form the model runs in
    parts = [onnx.load(str(path)) for path in write_float(model, tmp_path, opset=opset)]
    assert len(parts) == 3
    for part in parts:
        operators = {node.op_type for node in part.graph.node}
        assert "MatMul" in operators and not operators & {"DFT", "STFT"}
        assert [o.version for o in part.opset_import if o.domain in ("", "ai.onnx")] == [opset]
    from shared_core.deploy.exit_chain import ExitChain
    from shared_core.deploy.session import open_session

    chain = ExitChain([open_session(tmp_path / f"float{n}.onnx") for n in range(3)])
    with torch.no_grad():
        wanted = model(x).logits
    for head in range(3):
        policy = ExitPolicy("gate", 0.5).all_leave_at(head, 2)
        logits, exits = chain(x.numpy(), open_policy(policy))
        assert set(exits.tolist()) == {head}
        assert np.abs(logits - wanted[head].numpy()).max() < 1e-4


def open_policy(policy):
    from shared_core.deploy.exit_policy import ExitPolicy as InNumpy

    return InNumpy.from_state(policy.state_dict())


def test_fft_form_writes_dft_nodes(tmp_path):
    plain = build().backbone
    with pytest.raises(ValueError, match="opset is 17, expected 20"):
        write_float(plain, tmp_path, filter="fft", opset=17)
    (path,) = write_float(plain, tmp_path, filter="fft")
    graph = onnx.load(str(path)).graph
    assert sum(node.op_type == "DFT" for node in graph.node) >= 2 * 3


def test_a_copied_model_file_keeps_its_thresholds(finished, tmp_path, images):
    """What the run's evaluation found travels in the file; its record is not needed."""
    run, _ = finished
    (best,) = (run / "checkpoint/best").glob("*.pth")
    exits = json.loads((run / "result.json").read_text())["measured"]["exits"]
    alone = tmp_path / "alone" / "model.pth"
    alone.parent.mkdir()
    shutil.copy(best, alone)
    predictor = open_checkpoint(alone)
    kept = predictor.facts.exits
    for name, point in exits["points"].items():
        state = kept.points[name]
        assert state["kind"] == exits["policy"] and state["thresholds"] == [point["threshold"]]
        assert state["temperatures"] == exits["temperatures"]
    assert kept.policy == kept.points["balanced"]
    assert {kind: state["thresholds"][0] for kind, state in kept.rules.items()} == {
        kind: row["threshold"] for kind, row in exits["policies"].items()
    }
    assert call(predict, alone, images).code == 0


@pytest.fixture(scope="module")
def of_a_run(finished, tmp_path_factory) -> tuple[Path, Path, str]:
    """A finished run, its model folder with int8, and what the export said."""
    run, _ = finished
    (best,) = (run / "checkpoint/best").glob("*.pth")
    folder = tmp_path_factory.mktemp("of a run") / "model"
    done = call(export_model, best, folder, "--int8", "yes", "--max-accuracy-loss", 1)
    assert done.code == 0, done.err
    return run, folder, done.out


def test_an_export_is_judged_on_the_whole_test_split(of_a_run):
    run, folder, out = of_a_run
    facts, record = read_facts(folder), json.loads((run / "result.json").read_text())
    number = len(Manifest.read(run / "split.json").subset("test"))
    assert facts.measured["judged_on"] == "test" and f"on {number} images of" in out
    row = facts.measured["files"]["onnx"]
    assert row["agreement"]["same_class"] == row["agreement"]["same_exit"] == 1.0
    balanced = record["measured"]["exits"]["points"]["balanced"]
    assert row["accuracy"]["images"] == number
    assert row["accuracy"]["value"] == pytest.approx(balanced["accuracy"])  # what is shipped
    assert facts.provenance["split_hash"] == record["data"]["split_hash"]
    assert facts.measured["int8"]["kept"] and set(facts.files) == {"onnx", "onnx-int8"}


def test_int8_is_calibrated_on_images_that_are_not_of_the_test_split(of_a_run, monkeypatch):
    """Other test images change no range: only the calibration split is asked for."""
    from gfnet_dynn.deploy import exporting

    run, _, _ = of_a_run
    (best,) = (run / "checkpoint/best").glob("*.pth")
    asked = []
    read = exporting.run_images
    monkeypatch.setattr(
        exporting, "run_images", lambda p, s, split, d: asked.append(split) or read(p, s, split, d)
    )
    model, stored = exporting.load_checkpoint(best)
    options = exporting.ExportOptions(ExitOptions(), int8="yes")
    found = exporting.calibration_of(open_checkpoint(best), best, stored, options)
    items = Manifest.read(run / "split.json").subset("calibration")
    assert asked == ["calibration"] and len(found.images) == len(items)
    assert sorted(found.labels.tolist()) == sorted(item.label for item in items)


def test_calibration_folders_and_what_becomes_of_int8(files, images, tmp_path):
    words = (*QUICK, "--int8", "--calibration", images)
    done = call(export_model, files["plain"], tmp_path / "a", *words)
    assert done.code == 0, done.err
    verdict = read_facts(tmp_path / "a").measured["int8"]  # faster here or not: the machine's say
    assert ("int8 kept" in done.out) == verdict["kept"]
    strict = (*QUICK, "--int8", "yes", "--max-accuracy-loss", 0, "--calibration", images)
    assert call(export_model, files["plain"], tmp_path / "a", *strict).code == 0
    report = read_facts(tmp_path / "a").measured["int8"]
    assert report["int8_score"] >= report["float_score"] or not report["kept"]
    done = call(export_model, files["plain"], tmp_path / "b", "--int8")
    assert done.code == 2 and "expected --calibration FOLDER" in done.err


def test_a_policy_of_ones_own_is_what_the_folder_leaves_by(files, tmp_path):
    words = (*QUICK, "--policy", "max_prob", "--threshold", "0.4")
    done = call(export_model, files["bare"], tmp_path / "x", *words)
    assert done.code == 0 and "no thresholds are known" not in done.out
    exits = read_facts(tmp_path / "x").exits
    assert exits.policy["kind"] == "max_prob" and exits.policy["thresholds"] == [0.4]
    assert not exits.points
    done = call(export_model, files["bare"], tmp_path / "y", *QUICK)
    assert done.code == 0 and "no thresholds are known" in done.out


def test_errors_are_one_line(files, folders, images, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "bad.pth").write_text("no model")
    (tmp_path / "one").mkdir()
    plain, exits, bare = files["plain"], files["exits"], files["bare"]
    for command, words, code, says in (
        (export_model, (plain, tmp_path / "mine"), 2, "thesis.txt"),
        (export_model, (plain, tmp_path / "x", "--opset", 12), 2, "expected [13"),
        (export_model, (plain, tmp_path / "x", "--policy-point", "fast"), 2, "has no exits"),
        (export_model, (bare, tmp_path / "x", "--policy-point", "fast"), 2, "no record gives"),
        (export_model, (tmp_path / "no.pth", tmp_path / "x"), 1, "no.pth"),
        (export_model, (tmp_path, tmp_path / "x"), 2, "is a folder, expected a .pth file"),
        (export_model, (plain, tmp_path / "x", "--data-path", images), 2, "no split.json of a run"),
        (
            export_model,
            (plain, tmp_path / "x", "--int8", "--calibration", tmp_path / "one"),
            1,
            "no image",
        ),
        (predict, (exits, images, "--threshold", "0.5"), 2, "expected --policy KIND with it"),
        (predict, (exits, images, "--policy", "margin", "--threshold", "1,2,3"), 2, "3 thresholds"),
        (predict, (exits, images, "--policy", "entropy"), 2, "--policy entropy: expected"),
        (predict, (bare, images), 2, "expected --policy KIND --threshold T, or --no-exits"),
        (predict, (plain, images, "--policy-point", "fast"), 2, "has no exits"),
        (predict, (tmp_path / "bad.pth", images), 1, "bad.pth"),
        (predict, (tmp_path, images), 1, "model.json"),
    ):
        done = call(command, *words)
        assert done.code == code and says in done.err, (words, done.err)
        assert done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
    assert (tmp_path / "mine" / "thesis.txt").exists() and not (tmp_path / "x").exists()
