"""The summary: parameters and MACs by hand, and a model that is untouched."""

import pytest
import torch
from torch import nn

from torch_cls_zoo.models import build_model
from torch_cls_zoo.models.summary import format_summary, summarize


def test_layers_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 4 * 5, 7),
    )  # fmt: skip
    found = summarize(net, (8, 10))
    rows = {layer.name: layer for layer in found.layers}
    assert set(rows) == {"0", "1", "4"}
    assert (rows["0"].kind, rows["0"].shape) == ("Conv2d", (8, 4, 5))
    assert (rows["0"].params, rows["0"].macs) == (8 * 28, 8 * 4 * 5 * 27)
    assert (rows["1"].params, rows["1"].macs) == (16, 0)
    assert (rows["4"].params, rows["4"].macs) == (160 * 7 + 7, 160 * 7)
    assert found.params == 224 + 16 + 1127 and found.macs == 4320 + 1120


def test_a_network_is_as_before_and_matches_the_published_size() -> None:
    model = build_model("resnet18", num_classes=6).model.train()
    model.fc.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = summarize(model, (224, 224))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.params == 11_179_590 and found.trainable == 11_179_590 - 3072
    # 1813.56 M products by torch's own counter (halved FLOPs), fully connected layer included.
    assert found.macs == 1_813_564_416
    text = format_summary(found)
    assert "layer4.1.conv2" in text and "512 x 7 x 7" in text
    assert text.splitlines()[-1].startswith(
        "11,179,590 parameters (11,176,518 trainable), 1,813.56"
    )
    assert len(format_summary(found, layers=False).splitlines()) == 1


def test_macs_are_those_of_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for arch in ("mobilenetv3_small", "vit_tiny_patch16_224", "swin_t"):
        model = build_model(arch, num_classes=5, image_size=(64, 64)).model.eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        macs = summarize(model, (64, 64)).macs
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=2e-3), arch


def test_a_size_that_is_too_small_is_one_line() -> None:
    model = build_model("inception_v3", num_classes=3).model
    with pytest.raises(ValueError, match="--image_size 20 20") as caught:
        summarize(model, (20, 20))
    assert "\n" not in str(caught.value)
