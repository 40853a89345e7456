"""ResNet12 and its DropBlock, ResNet20 and ResNet50: counted, and rebuilt from other parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.model import build_model
from landmark_distill.resnet12 import DropBlock, ResNet12, block_mask
from landmark_distill.resnets import resnet20, resnet50


def brute_mask(seeds: np.ndarray, block: int) -> np.ndarray:
    n, channels, rows, columns = seeds.shape
    mask = np.ones((n, channels, rows + block - 1, columns + block - 1))
    for i, c, r, s in zip(*np.nonzero(seeds), strict=True):
        mask[i, c, r : r + block, s : s + block] = 0
    return mask


@pytest.mark.parametrize("n, zeros", [(3, 75), (5, 125), (25, 625), (50, 1250)])
def test_one_seed_a_channel_zeroes_one_whole_block_each(n, zeros):
    generator = np.random.default_rng(n)
    seeds = np.zeros((1, n, 8, 8))
    for channel in range(n):
        seeds[0, channel, generator.integers(8), generator.integers(8)] = 1
    mask = block_mask(torch.from_numpy(seeds), 5)
    assert mask.shape == (1, n, 12, 12)
    assert int((mask == 0).sum()) == zeros


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_mask_is_the_union_of_the_blocks(block):
    seeds = (np.random.default_rng(block).random((3, 4, 7, 9)) < 0.1).astype(float)
    found = block_mask(torch.from_numpy(seeds), block).numpy()
    np.testing.assert_array_equal(found, brute_mask(seeds, block))


def test_drop_block_is_nothing_in_eval_mode_and_at_rate_zero():
    x = torch.randn(2, 3, 6, 6)
    drop = DropBlock(5)
    assert torch.equal(drop(x, 0.0), x)
    assert drop.eval()(x, 0.9) is x


def test_drop_block_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropBlock(5)(torch.ones(64, 64, 24, 24), 0.1)
    dropped = (out == 0).double().mean().item()
    # gamma counts every block whole; overlaps make it a little less than 0.1
    assert 0.08 < dropped < 0.1
    assert out.double().mean().item() == pytest.approx(1, abs=1e-5)
    kept = out[out != 0]
    assert torch.all(kept == kept[0])


def test_drop_block_on_a_map_smaller_than_the_block():
    torch.manual_seed(0)
    out = DropBlock(5)(torch.ones(100, 50, 3, 3), 0.2)
    whole = (out == 0).flatten(2).sum(2)
    assert set(whole.unique().tolist()) == {0, 9}
    assert (out == 0).double().mean().item() == pytest.approx(0.2, abs=0.03)


def test_counter_grows_in_training_only_and_is_saved():
    net = ResNet12(16, drop_block_steps=4)
    images = torch.randn(2, 3, 32, 32)
    net(images), net(images)
    net.eval()
    net(images)
    assert net.state_dict()["steps"].item() == 2
    again = ResNet12(16, drop_block_steps=4)
    again.load_state_dict(net.state_dict())
    assert again.steps.item() == 2


def test_drop_block_ramps_up_over_the_steps():
    rates = []
    net = ResNet12(16, drop_rate=0.2, drop_block_steps=4)
    for block in (net.layer3, net.layer4):
        block.drop.register_forward_pre_hook(lambda _, given: rates.append(float(given[1])))
    for _ in range(6):
        net(torch.randn(2, 3, 32, 32))
    np.testing.assert_allclose(rates[::2], [0.05, 0.1, 0.15, 0.2, 0.2, 0.2], rtol=1e-6)
    assert rates[::2] == rates[1::2]
    assert net.layer1.drop is None and net.layer2.drop is None


def functional_resnet12(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The net of the description, written out from its weights, in eval mode."""

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
        return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    x = F.conv2d(x, state["stem.0.weight"], stride=2, padding=2)
    x = norm(x, "stem.1").clamp(min=0)
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        y = x
        for number in (1, 2, 3):
            y = F.conv2d(y, state[f"{layer}.conv{number}.weight"], padding=1)
            y = norm(y, f"{layer}.bn{number}")
            y = torch.where(y > 0, y, 0.1 * y) if number < 3 else y
        y = y + norm(F.conv2d(x, state[f"{layer}.downsample.0.weight"]), f"{layer}.downsample.1")
        y = torch.where(y > 0, y, 0.1 * y)
        n, c, h, w = y.shape
        y = y[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
        x = y.amax(dim=(3, 5))
    return x.flatten(2).mean(2)


def randomised(net: nn.Module) -> nn.Module:
    """Statistics and scales that are not the identity."""
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("running_mean") or (name.endswith("bias")):
            value.normal_()
    return net.double().eval()


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (37, 45)])
def test_resnet12_is_the_net_of_the_description(size):
    torch.manual_seed(0)
    net = randomised(ResNet12(32))
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(images), functional_resnet12(net.state_dict(), images))


def test_checkpointing_changes_no_number_of_resnet12():
    """Not even the running statistics and the counter, which a second pass would move again."""
    images, states, gradients = torch.randn(4, 3, 32, 32), [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = build_model("Resnet12", feature_dim=16, drop_rate=0.5, drop_block_steps=1)
        model.set_checkpointing(on)
        model.embed(images).square().sum().backward()
        states.append(model.state_dict())
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert states[1]["encoder.stem.1.num_batches_tracked"] == 1
    assert states[1]["encoder.layer3.bn1.num_batches_tracked"] == 1


def test_resnet50_is_torchvisions_with_unwidened_bottlenecks():
    models = pytest.importorskip("torchvision.models.resnet")

    class Narrow(models.Bottleneck):
        expansion = 1

    torch.manual_seed(0)
    net = randomised(resnet50(64))
    theirs = models.ResNet(Narrow, [3, 4, 6, 3])
    before = 64
    for number, depth in enumerate((3, 4, 6, 3)):
        width, blocks = 8 * 2**number, []
        for place in range(depth):
            stride = 2 if number and not place else 1
            short = None
            if before != width or stride == 2:
                short = nn.Sequential(
                    nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )
            blocks.append(Narrow(before, width, stride, short))
            before = width
        setattr(theirs, f"layer{number + 1}", nn.Sequential(*blocks))
    theirs.fc = nn.Identity()
    theirs = theirs.double().eval()
    renamed = {
        name.replace("stem.0", "conv1")
        .replace("stem.1", "bn1")
        .replace("layers.3", "layer4")
        .replace("layers.2", "layer3")
        .replace("layers.1", "layer2")
        .replace("layers.0", "layer1"): value
        for name, value in net.state_dict().items()
    }
    theirs.load_state_dict(renamed, strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(images), theirs(images))


def test_resnet20_has_the_published_count():
    """0.27 million, He et al. table 6; shortcuts here are 1x1 convolutions with a norm."""
    count = sum(p.numel() for p in resnet20(64).parameters())
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert count - shortcuts == 269_722 - (64 * 10 + 10)
    wide = resnet20(64, width=16)
    assert isinstance(wide.project, nn.Identity)
    assert isinstance(resnet20(1024).project, nn.Linear)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"feature_dim": 12}, "feature_dim is 12"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"drop_block": -1}, "drop_block and"),
        ({"drop_block_steps": 0}, "drop_block_steps are"),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        ResNet12(**options)


def test_bad_sizes_of_the_other_nets_are_named():
    with pytest.raises(ValueError, match="drop block is 0"):
        DropBlock(0)
    with pytest.raises(ValueError, match="feature_dim is 7"):
        resnet50(7)
    with pytest.raises(ValueError, match="width is 0"):
        resnet20(width=0)
