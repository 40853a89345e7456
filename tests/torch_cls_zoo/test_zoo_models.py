"""The networks: names, parameter counts of the published ones, weights to start from."""

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.checkpoints import CheckpointError, make_facts
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.for_torch.networks import find_network
from shared_core.runs import UsageError
from torch_cls_zoo.models import ALIASES, build_model, resolve
from torch_cls_zoo.models.bias_prior import set_bias_prior, share_of_classes

# Millions of parameters with 6 classes, counted on the first version's own networks.
PUBLISHED = {
    "mobilenetv3_small": 1.5240, "mobilenetv3_large": 4.2097,
    "efficientnet_b0": 4.0152, "efficientnet_b1": 6.5209, "efficientnet_b2": 7.7094,
    "efficientnet_b3": 10.7055, "efficientnet_b4": 17.5594, "efficientnet_b5": 28.3531,
    "efficientnet_b6": 40.7495, "efficientnet_b7": 63.8023, "efficientnet_b8": 84.6130,
    "resnest50": 25.4465, "resnest101": 46.2383, "resnest200": 68.1648, "resnest269": 108.8928,
    "resnest50_fast_1s1x64d": 24.1812, "resnest50_fast_2s1x64d": 25.4465,
    "resnest50_fast_4s1x64d": 29.8760, "resnest50_fast_1s2x40d": 23.9100,
    "resnest50_fast_2s2x40d": 24.9071, "resnest50_fast_4s2x40d": 28.3809,
    "resnest50_fast_1s4x24d": 23.6403,
    "resnet18": 11.1796, "resnet50": 23.5203, "shufflenet_v2_x1_0": 1.2598,
    "shufflenet_v2_x2_0": 5.3573, "mobilenet_v2": 2.2316,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Their first import takes seconds; it is no part of a test."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401


@pytest.mark.parametrize("arch", PUBLISHED)
def test_every_name_of_the_original_has_its_parameter_count(arch) -> None:
    with torch.device("meta"):
        model = build_model(arch, num_classes=6).model
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 4) == PUBLISHED[arch]


def test_older_names_win_and_others_are_the_core_s() -> None:
    for older, name in ALIASES.items():
        found = resolve(older.replace("_", "-"))
        assert f"{found.library}/{found.name}" == name
    assert resolve("resnet18.a1_in1k").library == "timm"
    for name in ("resnet18", "timm/resnet18", "efficientnet-b0"):
        want, found = find_network(name), resolve(name)
        assert (found.library, found.name) == (want.library, want.name)


@pytest.mark.parametrize(
    ("arch", "message"),
    [("resnt18", "--arch: .*close: resnet18"), ("foo/resnet18", "--arch"), ("", "--arch")],
)
def test_an_unknown_name_is_one_line(arch, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(arch, num_classes=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "size"), [("vit_b_16", (64, 96)), ("vit_b_16", (65, 65)), ("maxvit_t", (64, 64))]
)
def test_a_size_that_a_network_cannot_take_is_named(arch, size) -> None:
    with pytest.raises(ValueError, match=f"{arch} with --image_size {size[0]} {size[1]}"):
        build_model(arch, num_classes=3, image_size=size)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 1"):
        build_model("resnet18", num_classes=1)


def _saved(tmp_path, arch: str, classes: int, **more) -> tuple[nn.Module, str]:
    model = build_model(arch, num_classes=classes, **more).model
    path = str(tmp_path / f"{arch}.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return model, path


def test_a_head_of_another_size_is_replaced_and_said(tmp_path) -> None:
    source, path = _saved(tmp_path, "shufflenet_v2_x0_5", 10)
    built = build_model("shufflenet_v2_x0_5", num_classes=4, init=path)
    assert built.notes == ("the head of 10 classes (fc) was replaced by a new one for 4 classes",)
    for (name, mine), theirs in zip(
        built.model.state_dict().items(), source.state_dict().values(), strict=True
    ):
        assert name.startswith("fc.") or torch.equal(mine, theirs), name
    same = build_model("shufflenet_v2_x0_5", num_classes=10, init=path)
    assert same.notes == () and torch.equal(same.model.fc.weight, source.fc.weight)


def test_weights_of_another_network_are_refused(tmp_path) -> None:
    _source, path = _saved(tmp_path, "shufflenet_v2_x0_5", 4)
    with pytest.raises(CheckpointError, match="shufflenet"):
        build_model("squeezenet1_1", num_classes=4, init=path)
    with pytest.raises(UsageError, match="there is no such file"):
        build_model("squeezenet1_1", num_classes=4, init=tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not a file of weights")
    with pytest.raises(CheckpointError):
        build_model("squeezenet1_1", num_classes=4, init=tmp_path / "bad.pth")


def test_old_names_of_densenet_files_are_read(tmp_path) -> None:
    source = build_model("densenet121", num_classes=3).model
    old = {
        k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v
        for k, v in source.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    assert any("denselayer1.norm.1.weight" in name for name in old)
    torch.save(old, tmp_path / "old.pth")
    built = build_model("densenet121", num_classes=3, init=tmp_path / "old.pth")
    layer = "features.denseblock1.denselayer1.norm1"
    assert torch.equal(built.model.get_submodule(layer).weight, source.get_submodule(layer).weight)


def test_library_weights_that_cannot_be_had_are_one_line(monkeypatch) -> None:
    from torchvision import models

    def refuse(*words, **more):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict", refuse)
    with pytest.raises(ValueError, match="give a file by --init FILE") as caught:
        build_model("resnet18", num_classes=3, init="trained")
    assert "\n" not in str(caught.value)


def test_library_weights_are_used(monkeypatch) -> None:
    from torchvision import models

    source = models.shufflenet_v2_x0_5()
    kind = models.ShuffleNet_V2_X0_5_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **more: source.state_dict())
    built = build_model("shufflenet_v2_x0_5", num_classes=3, init="trained")
    assert torch.equal(built.model.conv5[0].weight, source.conv5[0].weight)
    assert "head of 1000 classes" in built.notes[0]


def test_a_checkpoint_of_the_zoo_is_read_as_weights_to_start_from(tmp_path) -> None:
    source = build_model("shufflenet_v2_x0_5", num_classes=3).model
    facts = make_facts(
        project="torch_cls_zoo", architecture="shufflenet_v2_x0_5", class_names="abc",
        framework="torch",
    )  # fmt: skip
    save_checkpoint(tmp_path / "a.pth", source.state_dict(), facts)
    built = build_model("shufflenet_v2_x0_5", num_classes=3, init=tmp_path / "a.pth")
    assert built.notes == () and torch.equal(built.model.fc.weight, source.fc.weight)


@pytest.mark.parametrize("family", ["sigmoid", "softmax"])
def test_bias_prior_starts_the_head_at_the_prior(family) -> None:
    model = build_model("shufflenet_v2_x0_5", num_classes=3, image_size=(32, 32)).model.eval()
    nn.init.zeros_(model.fc.weight)
    priors = [0.5, 0.3, 0.2]
    set_bias_prior(model, priors, num_classes=3, family=family)
    logits = model(torch.zeros(1, 3, 32, 32)).detach()
    probs = logits.softmax(1) if family == "softmax" else logits.sigmoid()
    np.testing.assert_allclose(probs[0].numpy(), priors, atol=1e-6)


def test_the_share_of_the_classes_is_the_prior_of_least_loss() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    shares = np.array(share_of_classes(labels.tolist(), 3))
    np.testing.assert_allclose(shares, np.array([51, 31, 11]) / 93)
    exact = np.array([50, 30, 10]) / 90
    one_hot = np.eye(3)[labels]

    def loss(bias: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-bias))
        return float(-(one_hot * np.log(p) + (1 - one_hot) * np.log(1 - p)).sum(1).mean())

    best = loss(np.log(exact / (1 - exact)))
    rng = np.random.default_rng(0)
    assert all(loss(np.log(exact / (1 - exact)) + rng.normal(0, 0.3, 3)) > best for _ in range(20))


@pytest.mark.parametrize(
    ("priors", "family", "message"),
    [
        ([0.5, 0.5], "sigmoid", "2 values, expected 1 or 3"),
        (1.0, "sigmoid", "expected 0 < prior < 1"),
        (0.01, "softmax", "change nothing with softmax"),
    ],
)
def test_bias_priors_that_say_nothing_are_refused(priors, family, message) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        set_bias_prior(model, priors, num_classes=3, family=family)
