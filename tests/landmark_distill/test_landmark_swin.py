"""Swin Transformer: the same output as timm's and torchvision's, and as counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import timm.models.swin_transformer as of_timm
import torch
from torch import nn

from landmark_distill.model import build_model
from landmark_distill.swin_transformer import (
    PatchEmbed,
    PatchMerging,
    SwinBlock,
    SwinTransformer,
    window_groups,
)

SMALL = {"embed_dim": 16, "depths": (2, 2, 4, 2), "heads": (2, 4, 8, 16)}


def small(**options) -> SwinTransformer:
    """A narrow net in eval mode, every parameter random."""
    torch.manual_seed(0)
    net = SwinTransformer(**{**SMALL, **options}).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.double()


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm merges at the beginning of a stage, the first release at the end of the one before."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        renamed[".".join(parts)] = value
    return renamed


def to_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            name = ".".join(["features.0", {"proj": "0", "norm": "2"}[parts[1]], parts[2]])
        elif "downsample" in parts:
            name = ".".join([f"features.{2 * int(parts[1]) + 2}", *parts[3:]])
        elif parts[0] == "layers":
            name = ".".join([f"features.{2 * int(parts[1]) + 1}", *parts[3:]])
            name = name.replace("fc1", "0").replace("fc2", "3")
            if "bias_table" in name:
                value = value.clone()
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("size, window", [(96, 3), (96, 6), (128, 4), ((64, 128), 2), (56, 7)])
def test_output_is_that_of_timm(size, window):
    sides = (size, size) if isinstance(size, int) else size
    ours = small(image_size=size, window=window)
    theirs = of_timm.SwinTransformer(
        img_size=sides,
        window_size=window,
        embed_dim=16,
        depths=SMALL["depths"],
        num_heads=SMALL["heads"],
        num_classes=0,
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    images = torch.randn(2, 3, *sides, dtype=torch.float64)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert found.shape == (2, 128)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size, window", [(96, 3), (64, 2)])
def test_output_is_that_of_torchvision(size, window):
    models = pytest.importorskip("torchvision.models.swin_transformer")
    ours = small(image_size=size, window=window)
    theirs = models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=list(SMALL["depths"]),
        num_heads=list(SMALL["heads"]),
        window_size=[window, window],
        stochastic_depth_prob=0.1,
    )
    theirs.head = nn.Identity()
    theirs = theirs.double().eval()
    missing, unexpected = theirs.load_state_dict(to_torchvision(ours.state_dict()), strict=False)
    assert not unexpected and all("relative_position_index" in name for name in missing)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name, heads", [("Swin_base", (4, 8, 16, 32)), ("Swin_tiny", (2, 4, 8, 16))]
)
def test_full_depth_at_384_pixels_is_that_of_timm(name, heads):
    torch.manual_seed(1)
    model = build_model(name, feature_dim=256).eval()
    depth = 18 if name == "Swin_base" else 6
    theirs = of_timm.SwinTransformer(
        img_size=384, window_size=12, embed_dim=32, depths=(2, 2, depth, 2), num_heads=heads,
        num_classes=0,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_timm(model.encoder.state_dict()), strict=True)
    images = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(images), theirs(images), rtol=1e-4, atol=1e-5)


def brute_attention(block: SwinBlock, x: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    """Token by token, in NumPy: who shares my window, and lies in the map where he seems to lie?"""
    height, width, channels = x.shape
    rows, columns = block.window
    state = {name: value.numpy() for name, value in block.attn.state_dict().items()}
    heads = block.attn.heads
    part = channels // heads
    qkv = x @ state["qkv.weight"].T + state["qkv.bias"]
    padded = (-(-height // rows) * rows, -(-width // columns) * columns)
    out = np.zeros_like(x)

    def place(r: int, c: int) -> tuple[int, int, bool, bool]:
        row, column = (r - shift[0]) % padded[0], (c - shift[1]) % padded[1]
        return row, column, r < shift[0], c < shift[1]  # wrapped around the border

    for r in range(height):
        for c in range(width):
            mine = place(r, c)
            seen, scores = [], []
            for a in range(height):
                for b in range(width):
                    other = place(a, b)
                    same = all(
                        mine[i] // side == other[i] // side for i, side in ((0, rows), (1, columns))
                    )
                    if not same or mine[2:] != other[2:]:
                        continue
                    step = (mine[0] - other[0] + rows - 1) * (2 * columns - 1)
                    step += mine[1] - other[1] + columns - 1
                    bias = state["relative_position_bias_table"][step]
                    q = qkv[r, c].reshape(3, heads, part)[0]
                    k = qkv[a, b].reshape(3, heads, part)[1]
                    seen.append((a, b))
                    scores.append((q * k).sum(1) / np.sqrt(part) + bias)
            weights = np.exp(np.array(scores))
            weights /= weights.sum(0)
            values = np.array([qkv[a, b].reshape(3, heads, part)[2] for a, b in seen])
            mixed = (weights[:, :, None] * values).sum(0).reshape(-1)
            out[r, c] = mixed @ state["proj.weight"].T + state["proj.bias"]
    return out


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 9), (3, 8), (8, 4)])
def test_attention_at_any_size_is_that_of_counting_tokens(size):
    torch.manual_seed(2)
    block = SwinBlock(
        8, heads=2, size=(8, 8), window=(4, 4), shifted=True, mlp_ratio=2.0, drop_path=0.0
    ).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    shift = tuple(2 if side > 4 else 0 for side in size)
    assert block.shift(size) == shift
    expected = brute_attention(block, x[0].numpy(), shift)
    with torch.no_grad():
        found = block.attend(x)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_groups_of_whole_unshifted_windows_are_left_out():
    cpu = torch.device("cpu")
    assert window_groups((8, 12), (4, 4), (0, 0), cpu) is None
    assert window_groups((8, 12), (4, 4), (2, 0), cpu).shape == (6, 16, 16)
    filled = window_groups((3, 4), (4, 4), (0, 0), cpu)[0]  # 12 real tokens, 4 to fill up
    assert filled[:12, :12].all() and not filled[:12, 12:].any()


def test_what_fills_up_an_image_changes_nothing_else():
    """A size that is no multiple of anything: the net answers, and every pixel counts."""
    net = small(image_size=96, window=3)
    images = torch.randn(1, 3, 75, 50, dtype=torch.float64, requires_grad=True)
    net(images).square().sum().backward()
    assert (images.grad.abs().sum(1) > 0).all()


def test_merging_takes_neighbours_in_the_order_of_the_first_release():
    merge = PatchMerging(1)
    merge.norm = nn.Identity()
    merge.reduction = nn.Identity()
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert merge(x)[0, 0, 0].tolist() == [0, 4, 1, 5]
    assert merge(x[:, :3, :3])[0, 1, 1].tolist() == [10, 0, 0, 0]


def test_tokens_are_patches():
    embed = PatchEmbed(5)
    assert embed(torch.randn(2, 3, 9, 16)).shape == (2, 3, 4, 5)


def test_window_follows_the_image():
    for size, window in ((384, 12), (224, 7), (96, 3), (16, 1)):
        assert SwinTransformer(**SMALL, image_size=size).layers[0].blocks[0].window == (window,) * 2


def test_one_window_is_not_shifted():
    net = SwinTransformer(**SMALL, image_size=384)
    shifts = [[block.shift(block.size) for block in stage.blocks[:2]] for stage in net.layers]
    assert shifts == [[(0, 0), (6, 6)]] * 3 + [[(0, 0), (0, 0)]]


def test_drop_path_is_off_in_eval_mode_and_grows_with_depth():
    net = SwinTransformer(**SMALL, image_size=32, drop_path=0.3)
    rates = [block.drop_path.rate for stage in net.layers for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 10), rtol=1e-6)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(net(images), net(images))
        net.eval()
        assert torch.equal(net(images), net(images))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    path = build_model("Swin_tiny", feature_dim=128, image_size=32).encoder.layers[3].blocks[1]
    path.drop_path.rate = 0.25
    x = torch.ones(40_000, 1, 1, 1)
    out = path.drop_path(x)
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))
    assert out.mean().item() == pytest.approx(1, abs=0.02)  # 0.003 standard error


def test_checkpointing_changes_no_number():
    torch.manual_seed(0)
    model = build_model("Swin_tiny", feature_dim=128, image_size=32, drop_path=0.5)
    images, found = torch.randn(2, 3, 32, 32), []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(3)
        model.embed(images).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": (3, 4, 8, 16)}, "heads are"),
        ({"heads": (2, 4)}, "heads are"),
        ({"image_size": 3}, "image_size 3"),
        ({"window": 0}, "window 0"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
    ],
)
def test_bad_sizes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        SwinTransformer(**{**SMALL, **options})
