"""predict.py says what a plain forward pass says, at the exit that the scores decide."""

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gfnet_dynn import predict
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from shared_core import checkpoints
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.runs import run_command

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("harbour", "beach", "pond", "field")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)  # not ImageNet's: they must come from the file
TEMPERATURES = (0.5, 2.0, 0.8)
SIZE = 16


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_command(predict.main, [str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def build(seed=0):
    torch.manual_seed(seed)
    backbone = GFNet(img_size=SIZE, patch_size=4, num_classes=4, embed_dim=12, depth=3)
    model = GFNetDynn(backbone, (0, 1), gate_init="torch")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def save(path, model, *, crop_pct=1.0, split_hash="a" * 64):
    facts = checkpoints.make_facts(
        project="gfnet_dynn",
        architecture=type(model).__name__,
        class_names=CLASSES,
        framework="torch",
        input_size=(3, SIZE, SIZE),
        mean=MEAN,
        std=STD,
        split_hash=split_hash,
        config={"crop_pct": crop_pct, "train_interpolation": "bicubic"},
        model=model.config(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model.state_dict(), facts)
    return path


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes())
    return path


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (9, 1, 1, 3))
    noise = rng.normal(0, 1, (9, SIZE, SIZE, 3)) * rng.uniform(5, 90, (9, 1, 1, 1))
    return np.clip(base + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory, pixels):
    root = tmp_path_factory.mktemp("some images")  # a blank in the path
    for index, one in enumerate(pixels):
        write(root / ("deep/er" if index > 5 else ".") / f"{index}.png", one)
    (root / ".hidden").mkdir()
    write(root / ".hidden" / "x.png", pixels[0])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def truth(pixels):
    """Calibrated probabilities (G+1, N, K) in float64, of a plain pass of every head."""
    x = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        logits = [z.double().numpy() for z in build()(torch.from_numpy(x)).logits]
    scaled = [z / t for z, t in zip(logits, TEMPERATURES, strict=True)]
    e = [np.exp(z - z.max(1, keepdims=True)) for z in scaled]
    return np.stack([one / one.sum(1, keepdims=True) for one in e])


def first_exit(p, threshold):
    return np.array(
        [next((e for e in (0, 1) if p[e, n].max() >= threshold), 2) for n in range(p.shape[1])]
    )


@pytest.fixture(scope="module")
def thresholds(truth):
    """Three wishes with different exits, none near a score."""
    scores = np.sort(truth[:2].max(axis=2).ravel())
    found = [(scores[i] + scores[i + 1]) / 2 for i in (15, 10, 4)]
    assert all(np.abs(scores - t).min() > 1e-4 for t in found)
    assert len({tuple(first_exit(truth, t)) for t in found}) == 3
    return dict(zip(("careful", "balanced", "fast"), map(float, found), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory, thresholds):
    """A run folder with a model and a record."""
    folder, model = tmp_path_factory.mktemp("run"), build()
    path = save(folder / "checkpoint" / "best" / "ckpt.pth", model)
    exits = {
        "policy": "max_prob",
        "temperatures": list(TEMPERATURES),
        "macs_per_exit": [float(c) for c in model.exit_costs()],
        "points": {name: {"threshold": t} for name, t in thresholds.items()},
        "policies": {"margin": {"threshold": 0.25}},
    }
    record = {"data": {"split_hash": "a" * 64}, "measured": {"exits": exits}}
    (folder / "result.json").write_text(json.dumps(record))
    return path


def order(images):
    return [str(images / f"{i}.png") for i in range(6)] + [
        str(images / "deep" / "er" / f"{i}.png") for i in range(6, 9)
    ]


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("point", [None, "careful", "balanced", "fast"])
def test_class_probability_exit_and_cost(run, images, truth, thresholds, tmp_path, batch, point):
    words = () if point is None else ("--policy-point", point)
    target = tmp_path / "out.json"
    code, out, err = call(run, images, "--batch", batch, "--json", target, *words)
    assert code == 0 and err == ""
    left = first_exit(truth, thresholds[point or "balanced"])
    content = json.loads(target.read_text())
    rows = content["images"]
    # Bytewise order in each folder; the folder "deep" comes after the digits.
    assert [row["path"] for row in rows] == order(images)
    chosen = truth[left, np.arange(9)]
    assert [row["exit_index"] for row in rows] == left.tolist()
    assert [row["exit_block"] for row in rows] == [(0, 1, None)[e] for e in left]
    assert [row["class"] for row in rows] == [CLASSES[k] for k in chosen.argmax(1)]
    for row, p in zip(rows, chosen, strict=True):
        assert row["probability"] == pytest.approx(p.max(), abs=1e-5)
        best = np.argsort(-p)[:3]
        assert [one["class"] for one in row["top"]] == [CLASSES[k] for k in best]
        assert [one["probability"] for one in row["top"]] == pytest.approx(p[best], abs=1e-5)
        assert row["ms"] > 0
    costs = build().exit_costs()
    summary = content["summary"]
    assert summary["mean_macs"] == pytest.approx(costs[left].mean())
    assert summary["macs_fraction"] == pytest.approx(costs[left].mean() / costs[-1])
    lines = out.strip().splitlines()
    assert len(lines) == 10 and lines[-1].startswith("9 images; mean cost")
    assert f"{100 * costs[left].mean() / costs[-1]:.1f} % of a full run" in lines[-1]


def test_own_threshold_keeps_the_temperatures_of_the_run(run, images, truth, tmp_path):
    p = np.sort(truth, axis=2)
    margin = p[..., -1] - p[..., -2]
    target = tmp_path / "o.json"
    for words, limits in (
        (("--threshold", "0.3,0.1"), (0.3, 0.1)),
        ((), (0.25, 0.25)),  # the balanced one of the record
    ):
        assert call(run, images, "--policy", "margin", *words, "--json", target)[0] == 0
        left = [
            next((e for e in (0, 1) if margin[e, n] >= limits[e]), 2) for n in range(truth.shape[1])
        ]
        assert [row["exit_index"] for row in json.loads(target.read_text())["images"]] == left


def test_no_exits_and_plain_models_run_to_the_final_head(run, images, truth, pixels, tmp_path):
    target = tmp_path / "o.json"
    assert call(run, images, "--no-exits", "--json", target)[0] == 0
    rows = json.loads(target.read_text())["images"]
    assert [row["class"] for row in rows] == [CLASSES[k] for k in truth[-1].argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(truth[-1].max(1), abs=1e-5)
    plain = save(tmp_path / "student.pth", build().backbone)
    assert call(plain, images, "--json", target, "--top", 99)[0] == 0
    again = json.loads(target.read_text())
    x = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        p = torch.softmax(build().backbone(torch.from_numpy(x)), 1).numpy()
    assert [row["probability"] for row in again["images"]] == pytest.approx(p.max(1), abs=1e-5)
    assert {row["exit_block"] for row in again["images"]} == {None}
    assert again["summary"]["macs_fraction"] == 1.0
    assert len(again["images"][0]["top"]) == 4


def test_crop_comes_from_the_file(tmp_path, pixels):
    model = build().backbone
    path = save(tmp_path / "half.pth", model, crop_pct=0.5)
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 256, (32, 40, 3)).astype(np.uint8)  # short side 32 = 16 / 0.5
    write(tmp_path / "wide.png", wide)
    target = tmp_path / "o.json"
    assert call(path, tmp_path / "wide.png", "--json", target)[0] == 0
    centre = wide[8:24, 12:28]
    x = ((centre[None] / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        p = torch.softmax(model(torch.from_numpy(x)), 1).numpy()[0]
    row = json.loads(target.read_text())["images"][0]
    assert row["class"] == CLASSES[p.argmax()]
    assert row["probability"] == pytest.approx(p.max(), abs=1e-5)


def test_bad_files_are_listed_and_stop_nobody(run, images, tmp_path, pixels):
    (tmp_path / "a").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"\x89PNG broken")
    write(tmp_path / "a" / "2.png", pixels[2])
    (tmp_path / "a" / "3.jpg").write_bytes(b"")
    target = tmp_path / "o.csv"
    words = (
        tmp_path / "a",
        images / "0.png",
        images / "0.png",
        tmp_path / "no",
        tmp_path / "empty",
    )
    code, out, err = call(run, *words, "--csv", target, "--top", 2)
    assert code == 1
    lines = err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("unreadable: ") for line in lines)
    for name in ("1.png", "3.jpg", "no: no such file", "empty: no image"):
        assert sum(name in line for line in lines) == 1
    assert out.strip().splitlines()[-1].startswith("2 images, 4 that could not be read")
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        str(tmp_path / "a" / "2.png"),
        str(images / "0.png"),
    ]
    assert set(rows[0]) == {
        *("path", "class", "probability", "exit", "macs", "ms", "class_2", "probability_2")
    }
    assert rows[0]["exit"] in ("block 0", "block 1", "final")
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])
    code, out, err = call(run, tmp_path / "a" / "1.png")
    assert code == 1 and "0 images, 1 that could not be read" in out


def test_a_record_of_another_split_or_network_is_not_used(run, tmp_path, images):
    best = tmp_path / "checkpoint" / "best"
    save(best / "x.pth", build(), split_hash="b" * 64)
    record = run.parents[2] / "result.json"
    (tmp_path / "result.json").write_text(record.read_text())
    code, out, err = call(best / "x.pth", images)
    assert code == 2 and "expected --policy KIND --threshold T, or --no-exits" in err
    assert call(best / "x.pth", images, "--policy", "gate", "--threshold", "0.5")[0] == 0
    save(best / "x.pth", build())
    assert call(best / "x.pth", images)[0] == 0
    (tmp_path / "result.json").write_text('{"measured": {}}')
    code, out, err = call(best / "x.pth", images)
    assert code == 1 and "is no record of a finished run" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--threshold", "0.5"), 2, "expected --policy KIND with it"),
        (("--policy", "margin", "--threshold", "0.1,0.2,0.3"), 2, "got 3 thresholds"),
        (("--policy", "margin", "--threshold", "nan"), 2, "expected a number"),
        (("--policy", "entropy"), 2, "--policy entropy: expected --policy KIND --threshold T"),
        (("--policy-point", "fast", "--no-exits"), 2, "not allowed with"),
        (("--batch", "0"), 2, "expected a whole number from 1"),
        (("--json", "/no/such/folder/x.json"), 2, "a folder that exists"),
    ],
)
def test_wrong_words(run, images, words, code, message):
    got, out, err = call(run, images, *words)
    assert got == code and message in err.splitlines()[-1] and out == ""


def test_wrong_models(tmp_path, images):
    (tmp_path / "x.pth").write_text("no model")
    for model, code, message in (
        (tmp_path / "x.pth", 1, "x.pth"),
        (tmp_path / "gone.pth", 1, "gone.pth"),
        (tmp_path, 1, "holds no model.json"),
    ):
        got, out, err = call(model, images)
        assert got == code and message in err and err.count("\n") == 1 and "error: " in err
    plain = save(tmp_path / "plain.pth", build().backbone)
    got, out, err = call(plain, images, "--policy-point", "fast")
    assert got == 2 and "has no exits" in err
    (tmp_path / "model.json").write_text('{"format": "another"}')
    got, out, err = call(tmp_path, images)
    assert got == 1 and "describes no model" in err and err.count("\n") == 1


@pytest.mark.slow
def test_runs_as_a_script_and_as_a_module_from_any_folder(run, images, tmp_path):
    script = str(REPOSITORY / "packages" / "gfnet_dynn" / "predict.py")
    path = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])
    outs = []
    for start, env in (
        ([script], {**os.environ, "PYTHONPATH": ""}),
        (["-m", "gfnet_dynn.predict"], {**os.environ, "PYTHONPATH": path}),
    ):
        words = [sys.executable, *start, str(run), str(images / "0.png")]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout.split()[:5])
    assert outs[0] == outs[1]
