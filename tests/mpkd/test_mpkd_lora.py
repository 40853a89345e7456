"""Adapters: begin as the original, train alone, merge exactly, are saved alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from mpkd.model.lora import (
    LoraLayer,
    adapter_weights,
    add_lora,
    freeze_norm_statistics,
    load_adapters,
    merge_lora,
)


def shake(net: nn.Module) -> None:
    """Random values for the adapters, so that they do something."""
    generator = torch.Generator().manual_seed(0)
    for value in adapter_weights(net).values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.05)


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, (1, 3), padding=(0, 1), bias=False),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2),
        nn.Linear(6, 5),
    ],
    ids=["strided", "flat", "grouped", "linear"],
)
def test_the_addition_is_the_merged_weight(base):
    base.double()
    shape = (3, 6) if isinstance(base, nn.Linear) else (3, base.in_channels, 9, 9)
    inputs = torch.randn(shape, dtype=torch.float64)
    layer = LoraLayer(base, rank=4, alpha=8.0)
    torch.testing.assert_close(layer(inputs), base(inputs), rtol=0, atol=0)  # B is zero
    shake(layer)
    adapted = layer(inputs)
    assert not torch.allclose(adapted, base(inputs))
    torch.testing.assert_close(layer.merged()(inputs), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [resnet18, mobilenet_v2])
def test_a_whole_network_merges(make):
    torch.manual_seed(0)
    net = make(num_classes=4).eval()
    names = {name for name, _ in net.named_modules()}
    targets = None if make is resnet18 else ["classifier", "features.1.conv.1"]
    adapted = add_lora(net, rank=4, targets=targets)
    shake(net)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(images)
        merge_lora(net)
        after = net(images)
    assert adapted and {name for name, _ in net.named_modules()} == names
    scale = before.abs().max()
    torch.testing.assert_close(after / scale, before / scale, rtol=0, atol=1e-5)


def test_only_the_adapters_and_the_new_head_learn():
    torch.manual_seed(0)
    net = resnet18(num_classes=4)
    adapted = add_lora(net, rank=2, trained=["fc"])
    assert "layer1.0.conv1" in adapted and "fc" not in adapted and "conv1" not in adapted
    before = {name: value.clone() for name, value in net.state_dict().items()}
    learned = set(adapter_weights(net))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        net.train()
        freeze_norm_statistics(net)
        optimizer.zero_grad()
        net(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    changed = {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == learned
    assert all("lora_" in name or name.startswith("fc.") for name in changed)


def test_adapters_alone_bring_the_network_back(tmp_path):
    torch.manual_seed(0)
    net = resnet18(num_classes=4).eval()
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    add_lora(net, rank=2)
    shake(net)
    torch.save(adapter_weights(net), tmp_path / "adapters.pth")
    other = resnet18(num_classes=4).eval()
    other.load_state_dict(plain)
    add_lora(other, rank=2)
    load_adapters(other, torch.load(tmp_path / "adapters.pth", weights_only=True), path="a")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(images), net(images), rtol=0, atol=0)
    wrong = resnet18(num_classes=4)
    add_lora(wrong, rank=2, targets=["layer1"])
    with pytest.raises(ValueError, match="does not fit"):
        load_adapters(wrong, adapter_weights(net), path="a")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoraLayer(nn.Conv2d(8, 8, 3, groups=4), rank=2, alpha=1), "4 groups"),
        (lambda: LoraLayer(nn.ReLU(), rank=2, alpha=1), "on ReLU"),
        (lambda: LoraLayer(nn.Linear(2, 2), rank=0, alpha=1), "rank is 0"),
        (lambda: add_lora(resnet18(num_classes=4), targets=["nowhere"]), "nowhere"),
        (lambda: add_lora(resnet18(num_classes=4), trained=["head"]), "'head'"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_where_convolutions_are_depthwise_the_pointwise_ones_are_adapted():
    net = mobilenet_v2(num_classes=4).eval()
    found = add_lora(net, rank=2)
    kinds = {type(net.get_submodule(name).base).__name__ for name in found}
    assert kinds == {"Conv2d", "Linear"} and len(found) == 35
    images = torch.randn(1, 3, 64, 64)
    wanted = net(images)
    torch.testing.assert_close(merge_lora(net)(images), wanted)
