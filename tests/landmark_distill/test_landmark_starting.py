"""What a network starts from: files of Microsoft's and timm's layout, the package, nothing."""

from __future__ import annotations

import pytest
import torch

from landmark_distill.config import NetworkConfig
from landmark_distill.model_files import build
from landmark_distill.optimizers import build_optimizer, set_lr
from landmark_distill.starting import start_model
from shared_core.checkpoints import CheckpointError
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
    optimizer = build_optimizer(
        "SGD", model.named_parameters(), lr=1, weight_decay=0, body=model.body, body_rate=0.1
    )
    set_lr(optimizer, 2.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.encoder.body.conv_stem.weight)] == pytest.approx(0.2)
    assert rates[id(model.encoder.project.weight)] == rates[id(model.head.weight)] == 2.0
