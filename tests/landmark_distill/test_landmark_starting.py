"""What a network starts from: files, packages, libraries; what stays, and who must be beaten."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from landmark_distill.config import NetworkConfig, ViewConfig
from landmark_distill.feature_layer import class_directions, turned, whitening
from landmark_distill.helpers import prepare_optimizer
from landmark_distill.model_files import build, load_model, read_head, save_model
from landmark_distill.optimizers import set_lr
from landmark_distill.starting import start_model
from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.features import feature_function
from shared_core.for_torch.networks import make_network
from shared_core.for_torch.pretrained import start_network
from shared_core.runs import read_metrics, read_result
from shared_core.weights.catalogue import entry
from shared_core.weights.finding import installed_file

SWIN = NetworkConfig(
    "Swin_base", 32, 32, options={"depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "window": 1}
)
LITE = NetworkConfig("efficientnet_lite0", 32, 16)


@pytest.mark.parametrize("merge_at", [0, 1], ids=["microsoft", "timm"])
def test_a_swin_file_of_either_layout_fills_the_body(tmp_path, merge_at):
    torch.manual_seed(0)
    source = build(SWIN, num_classes=None).encoder.state_dict()
    state = {}
    for name, value in source.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + merge_at)
        state[".".join(parts)] = value
    state["head.weight"] = torch.zeros(1000, 32)
    torch.save({"model": state}, tmp_path / "swin.pth")
    torch.manual_seed(1)
    model = build(SWIN, num_classes=3)
    head = model.head.weight.clone()
    start = start_model(model, SWIN, str(tmp_path / "swin.pth"), bgr=False)
    assert all(torch.equal(v, source[n]) for n, v in model.encoder.state_dict().items())
    assert torch.equal(model.head.weight, head) and len(start.facts["sha256"]) == 64


def test_a_foreign_file_is_refused_in_one_line(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2), "conv1.weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="do not fit") as error:
        start_model(build(SWIN, num_classes=3), SWIN, str(tmp_path / "x.pth"), bgr=False)
    assert "\n" not in str(error.value)


def test_the_package_fills_the_body_and_none_does_not():
    known = entry("efficientnet_lite0")
    theirs = torch.load(installed_file(known), weights_only=True)["_conv_stem.weight"]
    model = build(LITE, num_classes=3)
    layer = model.encoder.project.weight.clone()
    assert not start_model(model, LITE, "none", bgr=False).facts
    assert not torch.equal(model.encoder.body.conv_stem.weight, theirs)
    start = start_model(model, LITE, "auto", bgr=False)
    assert torch.equal(model.encoder.body.conv_stem.weight, theirs)
    assert torch.equal(model.encoder.project.weight, layer) and start.trained_body
    assert start.facts["sha256"] == known.sha256 and start.facts["licence"] == "Apache-2.0"
    train = SimpleNamespace(
        optimizer="SGD", schedule=SimpleNamespace(lr=1), weight_decay=0.0, momentum=0.0,
        decay_on="all", body_rate=0.1, layer_decay=0.5,
    )  # fmt: skip
    optimizer = prepare_optimizer(train, model, start)
    set_lr(optimizer, 2.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    body = model.encoder.body
    assert rates[id(model.encoder.project.weight)] == rates[id(model.head.weight)] == 2.0
    assert rates[id(body.conv_head.weight)] == pytest.approx(0.2)  # the last layer below
    assert rates[id(body.blocks[6][0].conv_pw.weight)] == pytest.approx(0.1)
    assert rates[id(body.blocks[5][-1].conv_pw.weight)] == pytest.approx(0.05)
    assert rates[id(body.conv_stem.weight)] < 1e-4


def test_a_bodys_own_head_is_no_head(tmp_path):
    """EfficientNet has a layer ``conv_head`` before the features."""
    model = build(LITE, num_classes=3)
    save_model(
        tmp_path / "m.pth", model.state_dict(), network=LITE, class_names=["a", "b", "c"], epoch=1,
        metrics={}, split_hash=None, config={}, views=ViewConfig(32), start={},
    )  # fmt: skip
    assert torch.equal(load_model(tmp_path / "m.pth")[0].head.weight, model.head.weight)
    head = read_head(tmp_path / "m.pth", mapped=False, dtype=None, scale=32.0, margin=0.1)
    assert torch.equal(head.weight, model.head.weight)


def test_the_first_layer_makes_classes_round_and_a_teacher_turns_it():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 40)
    spread = rng.normal(size=(5, 5))  # what images of one class differ by
    rows = rng.normal(size=(6, 5))[labels] * 4 + rng.normal(size=(240, 5)) @ spread + 7
    layer = whitening(rows, labels, width=5, shrink=0.0)
    found = layer(rows)
    inside = found - np.stack([found[labels == c].mean(0) for c in range(6)])[labels]
    cov = inside.T @ inside / (240 - 6)
    np.testing.assert_allclose(cov, np.eye(5) * cov[0, 0], atol=1e-9 * cov[0, 0])
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
    wide = whitening(rows, labels, width=8)
    assert wide.weight.shape == (8, 5) and not wide.weight[5:].any()
    # A teacher whose features are these, turned about: the student comes to lie on them.
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    moved = turned(layer, rows, found @ turn)
    np.testing.assert_allclose(moved(rows), found @ turn, atol=1e-9)
    means = class_directions(found, labels, count=7)
    first = (found[:40] / np.linalg.norm(found[:40], axis=1, keepdims=True)).sum(0)
    np.testing.assert_allclose(means[0], first / np.linalg.norm(first))
    assert not means[6].any()


def _body_file(path, name):
    """A library's network of random weights, with the statistics of blurred noise."""
    torch.manual_seed(3)
    model = make_network(name, num_classes=1000).model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.nn.functional.interpolate(torch.randn(64, 3, 8, 8), 32, mode="bilinear"))
    torch.save(model.state_dict(), path)
    return model.state_dict()


def _recall(rows, labels):
    """recall@1 by brute force."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = rows @ rows.T
    np.fill_diagonal(scores, -2)
    alone = np.array([(labels == one).sum() == 1 for one in labels])
    return (labels[scores.argmax(1)] == labels)[~alone].mean()


def _part(run, part):
    """uint8 images of a part of a run's split, and their fine classes."""
    split = json.loads((run / "split.json").read_text())
    items = [(path, label) for path, label, _, where in split["samples"] if where == part]
    files = [run / "data" / "scenes" / path for path, _ in items]
    return np.stack([cv2.imread(str(f))[..., ::-1] for f in files]), np.array([n for _, n in items])


@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", "timm/mobilenetv3_small_050"])
def test_a_librarys_body_is_tuned_end_to_end(name, landmark, landmark_tiny, file_of, tmp_path):
    pytest.importorskip(name.split("/")[0])
    given = _body_file(tmp_path / "body.pth", name)
    words = landmark_tiny(
        tmp_path, "--backbone_class", name, "--init", tmp_path / "body.pth", "--augment",
        "--max_epoch", "1", "--choose_by", "unseen", "--validation_share", "0.3",
    )  # fmt: skip
    done = landmark(*words)
    assert done.code == 0, done.err
    run = file_of(tmp_path, "result.json").parent
    last, _ = load_model(run / "last.pth")
    body = last.encoder.body.state_dict()
    kept = [key for key in body if key.endswith(("running_mean", "running_var"))]
    assert kept and all(torch.equal(body[key], given[key]) for key in kept)
    assert any(not torch.equal(body[key], given[key]) for key in body if key.endswith("weight"))
    # What it was before any training is judged first, among the validation classes.
    first, second = (one for one in read_metrics(run / "metrics.jsonl") if one["split"] == "val")
    assert (first["step"], second["step"]) == (0, 1)
    pixels, labels = _part(run, "validation")
    _, facts = load_model(run / "last.pth")
    normal = ((pixels / 255 - facts["mean"]) / facts["std"]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        rows = last.eval().embed(torch.tensor(normal, dtype=torch.float32)).numpy()
    assert second["recall_at_1"] == pytest.approx(_recall(rows, labels), abs=0.03)
    # The floor is what lite0 gives as it is, on the very test images.
    measured = read_result(run / "result.json")["measured"]
    pixels, labels = _part(run, "test")
    network = start_network("efficientnet_lite0", init="trained", num_classes=1000)
    rows = feature_function(network, num_classes=1000)(pixels)
    floor = measured["trained_features"]["recall_at_1"]
    assert floor == pytest.approx(_recall(rows, labels), abs=0.03)
    side = "BELOW" if measured["recall_at_1"] < floor else "not below"
    assert side in (run / "record.txt").read_text().splitlines()[-1]
