"""Resolution transfer: against scipy's signal resampling, hand cases, and the identity."""

import numpy as np
import pytest
import torch

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.global_filter import GlobalFilter
from gfnet_dynn.models.transfer import (
    grid_of,
    load_weights,
    resize_filter,
    resize_pos_embed,
    transfer_state,
)


def small(size=32, **options):
    settings = {"patch_size": 8, "num_classes": 3, "embed_dim": 6, "depth": 2} | options
    return GFNet(img_size=size, **settings)


@pytest.mark.parametrize("pixels, grid", [(256, 16), (128, 8), (600, 37)])
@pytest.mark.parametrize("method", ["official", "spectrum"])
def test_published_sizes_transfer_and_load(pixels, grid, method):
    source = build_gfnet("gfnet-ti", img_size=224, num_classes=5, embed_dim=16, depth=2)
    target = build_gfnet("gfnet-ti", img_size=pixels, num_classes=5, embed_dim=16, depth=2)
    load_weights(target, source.state_dict(), method=method)
    assert target.blocks[1].filter.complex_weight.shape == (grid, grid // 2 + 1, 16, 2)
    assert target.pos_embed.shape == (1, grid * grid, 16)
    assert torch.equal(target.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("method", ["official", "spectrum"])
def test_identity_when_nothing_changes(method):
    weight, pos = torch.randn(5, 4, 3, 2), torch.randn(1, 35, 3)
    assert torch.equal(resize_filter(weight, (5, 7), (5, 7), method=method), weight)
    assert torch.equal(resize_pos_embed(pos, (5, 7), (5, 7)), pos)
    model = small()
    for name, value in transfer_state(model.state_dict(), (4, 4), method=method).items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("new", [(8, 8), (16, 16), (37, 37), (9, 20)])
def test_constants_stay_constant_by_the_official_method(new):
    weight = torch.full((14, 8, 3, 2), 0.7)
    assert torch.allclose(resize_filter(weight, (14, 14), new), torch.tensor(0.7), atol=1e-5)
    pos = torch.full((1, 196, 3), -0.3)
    assert torch.allclose(resize_pos_embed(pos, (14, 14), new), torch.tensor(-0.3), atol=1e-5)


def bicubic(values, size, *, align_corners):
    """Cubic convolution with a = -0.75 along the first axis, edges repeated."""
    n, a = len(values), -0.75
    out = []
    for i in range(size):
        at = i * (n - 1) / (size - 1) if align_corners else (i + 0.5) * n / size - 0.5
        total = 0
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            t = abs(at - j)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            total = total + (near if t <= 1 else far) * values[min(max(j, 0), n - 1)]
        out.append(total)
    return np.stack(out)


def test_official_interpolation_is_cubic_convolution_on_the_named_sample_points():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(9, 5, 3, 2))
    rows = bicubic(weight, 16, align_corners=True)
    truth = bicubic(rows.swapaxes(0, 1), 9, align_corners=True).swapaxes(0, 1)
    out = resize_filter(torch.tensor(weight), (9, 8), (16, 17)).numpy()
    assert np.allclose(out, truth, atol=1e-10)
    pos = rng.normal(size=(7, 7, 3))
    rows = bicubic(pos, 16, align_corners=False)
    truth = bicubic(rows.swapaxes(0, 1), 5, align_corners=False).swapaxes(0, 1)
    out = resize_pos_embed(torch.tensor(pos).view(1, 49, 3), (7, 7), (16, 5))
    assert np.allclose(out.view(16, 5, 3).numpy(), truth, atol=1e-10)


def upsampled(image, grid):
    """The band-limited image through the same points, on another grid (float64, by sums)."""
    h, w, _ = image.shape
    spectrum = np.fft.fft2(image, axes=(0, 1)) / (h * w)
    out = np.zeros((*grid, image.shape[2]), complex)
    y, x = np.arange(grid[0]) / grid[0], np.arange(grid[1]) / grid[1]
    for a, fa in enumerate(np.fft.fftfreq(h, 1 / h)):
        for b, fb in enumerate(np.fft.fftfreq(w, 1 / w)):
            wave = np.exp(2j * np.pi * (fa * y[:, None] + fb * x[None, :]))
            out += spectrum[a, b] * wave[..., None]
    return out.real


def band_limited(grid, limit, rng):
    """A random real image without any frequency above ``limit`` cycles."""
    noise = np.fft.fft2(rng.normal(size=(*grid, 2)), axes=(0, 1))
    fy, fx = np.fft.fftfreq(grid[0], 1 / grid[0]), np.fft.fftfreq(grid[1], 1 / grid[1])
    noise[(abs(fy)[:, None] > limit) | (abs(fx)[None, :] > limit)] = 0
    return np.fft.ifft2(noise, axes=(0, 1)).real


@pytest.mark.parametrize(
    "old, new, limit",
    [
        ((8, 8), (16, 16), 3),
        ((14, 14), (37, 37), 6),
        ((7, 9), (8, 12), 3),
        ((16, 16), (8, 8), 3),
        ((9, 12), (8, 7), 3),
        ((8, 8), (8, 12), 3),
        ((8, 8), (12, 8), 3),
    ],
)
def test_spectrum_method_answers_band_limited_images_alike(old, new, limit):
    rng = np.random.default_rng(0)
    image = band_limited(old, limit, rng)
    layer = GlobalFilter(2, old).double()
    with torch.no_grad():
        layer.complex_weight.copy_(torch.tensor(rng.normal(size=layer.complex_weight.shape)))
    resized = GlobalFilter(2, new).double()
    resized.load_state_dict(
        {"complex_weight": resize_filter(layer.complex_weight, old, new, method="spectrum")}
    )
    with torch.no_grad():
        answer = layer(torch.tensor(image).view(1, -1, 2)).view(*old, 2).numpy()
        other = resized(torch.tensor(upsampled(image, new)).view(1, -1, 2)).view(*new, 2).numpy()
    assert np.allclose(other, upsampled(answer, new), atol=1e-10)


def test_spectrum_upsizing_keeps_the_whole_response_of_images_with_nyquist_columns():
    # A wave at the old grid's Nyquist is an ordinary wave on the new one: the real part answers.
    rng = np.random.default_rng(1)
    layer = GlobalFilter(1, (4, 6)).double()
    with torch.no_grad():
        layer.complex_weight.copy_(torch.tensor(rng.normal(size=layer.complex_weight.shape)))
    new = resize_filter(layer.complex_weight, (4, 6), (8, 12), method="spectrum").detach()
    assert new[:, 4:].abs().max() == 0 and new[3:6].abs().max() == 0
    nyquist = layer.complex_weight[:, 3].detach().numpy()
    assert new[0, 3, 0, 0].item() == pytest.approx(nyquist[0, 0, 0])
    assert new[0, 3, 0, 1].item() == 0
    assert new[1, 3, 0, 1].item() == pytest.approx((nyquist[1, 0, 1] - nyquist[3, 0, 1]) / 2)


def test_new_head_and_official_form():
    source, target = small(), small(48, num_classes=7)
    head = target.head.weight.clone()
    load_weights(target, {"model": source.state_dict()}, new_head=True)
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.blocks[1].mlp.fc2.bias, source.blocks[1].mlp.fc2.bias)
    assert grid_of(source.state_dict()) == (4, 4)
    assert grid_of(small((32, 56)).state_dict()) == (4, 7)


def test_what_does_not_fit_is_an_error_and_nothing_changes():
    model = small()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="head.weight"):
        load_weights(model, small(num_classes=4).state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(model, small(depth=3).state_dict())
    with pytest.raises(ValueError, match="got no"):
        load_weights(model, {"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="method"):
        load_weights(model, small(48).state_dict(), method="magic")
    with pytest.raises(ValueError, match="expected"):
        resize_pos_embed(torch.zeros(1, 17, 3), (4, 4), (5, 5))
    with pytest.raises(ValueError, match="expected"):
        resize_filter(torch.zeros(4, 4, 3, 2), (4, 4), (5, 5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
