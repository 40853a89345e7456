"""Slimming and pruning: the subgradient by hand, cut networks equal to masked ones, the command."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from command_tools import run_main
from shared_core.checkpoints import CheckpointError, make_facts
from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, save_checkpoint
from shared_core.runs import read_result, run_command
from torch_cls_zoo import prune as prune_command
from torch_cls_zoo.models import build_model
from torch_cls_zoo.optim import build_optimizer
from torch_cls_zoo.pruning.channel_graph import ChannelGraph
from torch_cls_zoo.pruning.cutting import choose, cut_channels, mask, merge_kept, prune
from torch_cls_zoo.pruning.slimming import (
    add_slimming,
    scales,
    slimming_note,
    slimming_reach,
    sparsity_facts,
)

SIZE = (64, 64)


def _random(arch: str, classes: int = 4) -> nn.Module:
    """A network whose BatchNorm scales and biases are all different and not 0."""
    torch.manual_seed(1)
    model = build_model(arch, num_classes=classes, image_size=SIZE).model
    with torch.no_grad():
        for gamma in scales(model).values():
            gamma.uniform_(0.05, 1.0)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("name", ["sgd", "adam", "ranger"])
def test_slimming_moves_scales_towards_zero_beside_the_step(name) -> None:
    layers = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    start = torch.tensor([0.5, -0.5, 0.0, 1.0])
    for layer in layers:
        layer[1].weight.data.copy_(start)
        for p in layer.parameters():
            p.grad = torch.full_like(p, 0.1)
    slim, plain = (build_optimizer(name, layer, 0.1, weight_decay=0.0) for layer in layers)
    add_slimming(slim, layers[0], 0.02)
    slim.step()
    plain.step()
    moved = layers[1][1].weight - layers[0][1].weight
    np.testing.assert_allclose(
        moved.detach().numpy(), 0.1 * 0.02 * np.sign(start.numpy()), atol=1e-7
    )
    assert torch.equal(layers[0][0].weight, layers[1][0].weight)  # convolutions are not slimmed
    assert torch.equal(layers[0][1].bias, layers[1][1].bias)


def test_slimming_needs_something_to_slim() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="no BatchNorm scale"):
        add_slimming(build_optimizer("sgd", model, 0.1), model)
    with pytest.raises(ValueError, match="--slim 0"):
        add_slimming(build_optimizer("sgd", model, 0.1), model, 0.0)


def test_facts_of_scales() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].weight.data.copy_(torch.tensor([0.001, -0.5, 0.25, 0.0]))
    facts = sparsity_facts(model)
    assert facts["gammas"] == 4 and facts["near_zero"] == 0.5
    assert facts["mean"] == pytest.approx((0.001 + 0.5 + 0.25) / 4)


def test_the_reach_is_how_far_scales_really_go_without_a_gradient() -> None:
    layer, rates, steps = nn.BatchNorm2d(3), [0.1, 0.5], 4
    optimizer = build_optimizer("sgd", layer, 1.0, weight_decay=0.0, momentum=0.0)
    add_slimming(optimizer, layer, 0.05)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(steps):
            layer.weight.grad = torch.zeros(3)
            optimizer.step()
    reach = slimming_reach(rates, steps, 0.05)
    assert reach == pytest.approx(0.12) == pytest.approx(1 - layer.weight[0].item())
    assert slimming_note(reach, 0.05) is None
    # The README's own values: Adam at 1e-4 and 5e-4, and 6000 steps of them.
    assert "at most 0.0003" in slimming_note(slimming_reach([1e-4], 6000, 5e-4), 5e-4)


def test_a_training_says_whether_slimming_gets_anywhere(zoo_words, zoo_command, tmp_path) -> None:
    done = zoo_command(*zoo_words(tmp_path / "run", "--sparsity"))
    assert done.code == 0, done.err
    assert "expected 0.1 or more of scales near 1" in done.out and "batch-norm scales: " in done.out
    told = read_result(tmp_path / "run" / "result.json")["measured"]["training"]
    assert told["batch_norm_scales"]["gammas"] > 100
    far = zoo_command(*zoo_words(tmp_path / "far", "--sparsity", "--slim", 100))
    assert "expected 0.1 or more" not in far.out and "batch-norm scales: " in far.out


ARCHS = [
    "resnet18", "mobilenet_v2", "mobilenetv3_small", "densenet121", "shufflenet_v2_x0_5",
    "googlenet", "efficientnet_b0", "resnest50_fast_1s1x64d", "regnet_y_400mf",
    "timm/efficientnet_b0", "timm/resnet18", "resnetv2_50", "seresnet18", "vgg11_bn",
]  # fmt: skip


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.slow] if a == "vgg11_bn" else []) for a in ARCHS]
)
def test_the_cut_network_is_the_masked_one_and_smaller(arch) -> None:
    model = _random(arch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cut, plan, proof = prune(model, SIZE, ratio=0.4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(plan.cut) == int(0.4 * plan.groups) > 0
    sizes = [sum(p.numel() for p in net.parameters()) for net in (model, cut)]
    assert sizes[1] < 0.9 * sizes[0]
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = mask(model, plan.kept)(images)
        scale = expected.abs().max()
        assert float((cut(images) - expected).abs().max() / scale) < 1e-5
        assert float((model(images) - expected).abs().max() / scale) > 1e-3  # it did cut something
    assert proof["to_masked"] < 1e-5 < proof["to_whole"]
    # What was cut are the smallest: no group that stays has all its scales below a cut one's.
    assert plan.threshold < 1.0


def test_scales_of_zero_and_shifts_of_zero_are_cut_without_a_trace() -> None:
    model = _random("resnet18")
    with torch.no_grad():
        for name in ("layer1.0.bn1", "layer2.1.bn1"):
            layer = model.get_submodule(name)
            layer.weight[::2] = 0.0
            layer.bias[::2] = 0.0
    graph = ChannelGraph(model, torch.zeros(1, 3, *SIZE))
    groups = choose(graph, ratio=0.0).groups
    cut, plan, proof = prune(model, SIZE, ratio=96.5 / groups)  # 32 of 64, 64 of 128
    assert {k: len(v["out"]) for k, v in plan.kept.items() if k.endswith("bn1")} == {
        "layer1.0.bn1": 32, "layer2.1.bn1": 64,
    }  # fmt: skip
    assert proof["to_whole"] < 1e-5 and cut.layer1[0].conv1.out_channels == 32


def test_channels_that_are_added_are_one_group() -> None:
    """In ResNet's stage all blocks write to one sum: a channel stays while one scale is large."""
    model = _random("resnet18")
    with torch.no_grad():
        for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2"):
            model.get_submodule(name).weight[7] = 1e-6
            model.get_submodule(name).weight[8] = 1e-6
        model.layer1[1].bn2.weight[8] = 5.0
    graph = ChannelGraph(model, torch.zeros(1, 3, *SIZE))
    plan = choose(graph, ratio=0.01)
    for name in ("conv1", "bn1", "layer1.0.conv2", "layer1.1.bn2"):
        assert 7 not in plan.kept[name]["out"] and 8 in plan.kept[name]["out"]
    assert 7 not in plan.kept["layer1.0.conv1"]["in"] and 7 not in plan.kept["layer2.0.conv1"]["in"]


def test_every_layer_keeps_its_least_share() -> None:
    cut, plan, _proof = prune(_random("mobilenet_v2"), SIZE, ratio=0.99, least=0.25)
    whole = build_model("mobilenet_v2", num_classes=4).model
    for (name, small), large in zip(cut.named_modules(), whole.modules(), strict=True):
        if isinstance(small, nn.BatchNorm2d):
            assert small.num_features >= 0.25 * large.num_features, name


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("squeezenet1_1", {"ratio": 0.5}, "no channel of this network can be cut"),
        ("convnext_tiny", {"ratio": 0.5}, "no channel of this network can be cut"),
        ("shufflenet_v2_x0_5", {"ratio": 1.0}, "--prune_ratio 1.0"),
        ("shufflenet_v2_x0_5", {"ratio": 0.5, "least": 0.0}, "--prune_least 0"),
    ],
)
def test_what_cannot_be_cut_is_refused(arch, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        prune(build_model(arch, num_classes=3).model, SIZE, **settings)


def test_a_wrong_cut_is_noticed(monkeypatch) -> None:
    from torch_cls_zoo.pruning import cutting

    def careless(model, kept):
        return cut_channels(model, kept).apply(_disturb)

    def _disturb(module):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.data += 0.5

    monkeypatch.setattr(cutting, "cut_channels", careless)
    with pytest.raises(ValueError, match="differs from the masked one"):
        prune(_random("shufflenet_v2_x0_5"), SIZE, ratio=0.3)


def test_two_cuts_are_told_as_one() -> None:
    model = _random("resnet18")
    once, first, _ = prune(model, SIZE, ratio=0.3)
    twice, second, _ = prune(once, SIZE, ratio=0.3)
    both = merge_kept(first.kept, second.kept)
    again = cut_channels(build_model("resnet18", num_classes=4).model, both).eval()
    again.load_state_dict(twice.state_dict())
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(again(images), twice(images))
    width = model.layer3[0].conv1.out_channels
    kept = both["layer3.0.conv1"]["out"]
    assert (
        torch.equal(twice.layer3[0].bn1.weight, model.layer3[0].bn1.weight[torch.tensor(kept)])
        and len(kept) < width
    )


def test_a_pruned_network_can_be_trained_on(tmp_path) -> None:
    cut, _plan, _proof = prune(_random("mobilenet_v2"), SIZE, ratio=0.5)
    cut.train()
    optimizer = build_optimizer("sgd", cut, 0.01)
    loss = nn.functional.cross_entropy(cut(torch.randn(4, 3, *SIZE)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in cut.parameters())
    optimizer.step()


@pytest.fixture
def checkpoint(tmp_path):
    model = _random("shufflenet_v2_x0_5")
    facts = make_facts(
        project="torch_cls_zoo", architecture="shufflenet_v2_x0_5", class_names="abcd",
        framework="torch", input_size=(3, *SIZE),
    )  # fmt: skip
    save_checkpoint(tmp_path / "model.pth", model.state_dict(), facts)
    return tmp_path / "model.pth"


def test_the_command_writes_a_checkpoint_that_builds_again(checkpoint, tmp_path, capsys) -> None:
    words = ["--resume", str(checkpoint), "--output", str(tmp_path / "out"), "--prune_ratio", "0.5"]
    assert run_command(prune_command.main, words) == 0
    said = capsys.readouterr().out
    assert "cut" in said and "MACs:" in said and "masked network" in said
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert report["after"]["params"] < report["before"]["params"]
    assert report["after"]["macs"] < report["before"]["macs"]
    path = tmp_path / "out" / "pruned_shufflenet_v2_x0_5.pth"
    weights, facts = load_checkpoint(path, project="torch_cls_zoo")
    built = build_model("shufflenet_v2_x0_5", num_classes=4, kept=facts["pruned"])
    fit_into(built.model, weights, path=path)
    assert sum(p.numel() for p in built.model.parameters()) == report["after"]["params"]
    started = build_model("shufflenet_v2_x0_5", num_classes=4, init=path)
    assert started.kept == facts["pruned"] and "a pruned network" in started.notes[0]
    assert torch.equal(started.model.fc.weight, built.model.fc.weight)
    with pytest.raises(CheckpointError, match="holds a pruned shufflenet_v2_x0_5, --arch says"):
        build_model("shufflenet_v2_x1_0", num_classes=4, init=path)
    words[1], words[3] = str(path), str(tmp_path / "again")  # and once more
    assert run_command(prune_command.main, words) == 0
    _weights, facts = load_checkpoint(tmp_path / "again" / path.name)
    build_model("shufflenet_v2_x0_5", num_classes=4, init=tmp_path / "again" / path.name)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--prune_ratio", "1.5"], 2, "--prune_ratio: 1.5"),
        (["--batch_size", "0"], 2, "--batch_size: 0"),
        (["--data", "nowhere"], 1, "nowhere"),
        (["--resume", "none.pth"], 1, "none.pth"),
    ],
)
def test_the_command_refuses_in_one_line(checkpoint, tmp_path, more, code, message) -> None:
    words = ["--resume", str(checkpoint), "--output", str(tmp_path / "out"), *more]
    done = run_main(prune_command.main, words)
    assert done.code == code and message in done.err and done.err.count("\n") == 1
