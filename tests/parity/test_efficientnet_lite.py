"""EfficientNet-lite: torch = Paddle = timm on real pictures, with the published weights."""

import cv2
import numpy as np
import pytest
import torch

from shared_core.checkpoints.names import linear_names, to_paddle
from shared_core.for_torch.efficientnet_lite import EfficientNetLite, drop_path
from shared_core.weights import catalogue, finding
from shared_core.weights.reading import read_weights

pytestmark = pytest.mark.parity
timm = pytest.importorskip("timm")
paddle = pytest.importorskip("paddle")
PALACE, DAISY = 698, 985  # classes of ImageNet


def pictures(network) -> np.ndarray:
    """scikit-learn's two photographs (a temple in China, a flower), normalised (2, 3, S, S)."""
    from sklearn.datasets import load_sample_images

    side = network.input_size
    views = []
    for photo in load_sample_images().images:
        edge = (photo.shape[1] - photo.shape[0]) // 2
        square = photo[:, edge : edge + photo.shape[0]]
        views.append(cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA))
    values = np.stack(views).astype(np.float32) / 255
    values = (values - np.float32(network.mean)) / np.float32(network.std)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module", params=catalogue.names())
def case(request):
    network = catalogue.entry(request.param)
    path = finding.installed_file(network)
    if path is None:
        pytest.skip(f"{network.pip} is not installed")
    return network, read_weights(path)


def test_torch_paddle_and_timm_agree_and_know_the_pictures(case):
    network, arrays = case
    images = pictures(network)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    theirs = timm.create_model(f"tf_{network.name}").eval()
    theirs.load_state_dict(tensors)
    ours = EfficientNetLite(network.name).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(tensors)
    with torch.no_grad():
        truth = theirs(torch.from_numpy(images)).numpy()
        got = ours(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, truth, atol=1e-5)
    from shared_core.for_paddle.efficientnet_lite import EfficientNetLite as PaddleNet

    twin = PaddleNet(network.name)
    twin.eval()
    named = to_paddle(arrays, linear_names(arrays))
    assert set(twin.state_dict()) == set(named)
    twin.set_state_dict(named)
    with paddle.no_grad():
        third = twin(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(third, truth, atol=1e-5)
    assert truth[0].argmax() == PALACE
    # The flower is a dahlia, of which ImageNet has no class: lite2 sees a honeycomb in it.
    assert truth[1].argmax() == DAISY or network.name == "efficientnet_lite2"


@pytest.mark.parametrize("side", [32, 37, 64])
def test_any_side_works_and_the_classifier_can_be_left_out(side):
    from shared_core.for_paddle.efficientnet_lite import EfficientNetLite as PaddleNet

    torch.manual_seed(0)
    net = EfficientNetLite(num_classes=3).eval()
    images = torch.randn(2, 3, side, side)
    assert net(images).shape == (2, 3)
    assert net.forward_features(images).shape == (2, 1280, -(-side // 32), -(-side // 32))
    net.reset_classifier(0)
    assert net(images).shape == (2, 1280)
    twin = PaddleNet(num_classes=3)
    twin.eval()
    assert twin(paddle.to_tensor(images.numpy())).shape == [2, 3]
    twin.reset_classifier(0)
    assert twin(paddle.to_tensor(images.numpy())).shape == [2, 1280]


def test_drop_path_keeps_the_mean_and_only_while_training():
    from shared_core.for_paddle.efficientnet_lite import drop_path as paddle_drop_path

    torch.manual_seed(0)
    paddle.seed(0)
    ones = torch.ones(4000, 1, 1, 1)
    for got in (
        drop_path(ones, 0.25, training=True).numpy(),
        paddle_drop_path(paddle.to_tensor(ones.numpy()), 0.25, training=True).numpy(),
    ):
        np.testing.assert_allclose(np.unique(got), [0, 4 / 3], rtol=1e-6)
        assert abs(got.mean() - 1) < 0.03
    assert drop_path(ones, 0.25, training=False) is ones
    assert drop_path(ones, 0, training=True) is ones
    rates = [b.drop for stage in EfficientNetLite(drop_path_rate=0.2).blocks for b in stage]
    np.testing.assert_allclose(rates, 0.2 * np.arange(16) / 16)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("expansion", [1, 6])
def test_blocks_of_both_twins_give_the_same_numbers(side, expansion):
    from shared_core.for_paddle import efficientnet_lite as theirs
    from shared_core.for_torch import efficientnet_lite as ours
    from shared_core.weights.efficientnet_lite import BlockPlan

    torch.manual_seed(0)
    images = torch.randn(2, 8, side, side)
    block = ours.Block(BlockPlan(8, 16, 5, 2, expansion, 0, 1), drop=0.0).eval()
    twin = theirs.Block(BlockPlan(8, 16, 5, 2, expansion, 0, 1), drop=0.0)
    twin.eval()
    for one, other in (
        (block, twin),
        (ours.SameConv(8, 4, 3, stride=2), theirs.SameConv(8, 4, 3, stride=2)),
    ):
        arrays = {name: value.numpy() for name, value in one.state_dict().items()}
        other.set_state_dict(to_paddle(arrays, []))
        with torch.no_grad(), paddle.no_grad():
            truth = one(images).numpy()
            got = other(paddle.to_tensor(images.numpy())).numpy()
        assert truth.shape[2:] == (-(-side // 2),) * 2
        np.testing.assert_allclose(got, truth, atol=1e-5)
