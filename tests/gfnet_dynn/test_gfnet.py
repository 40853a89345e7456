"""GFNet's sizes, names and forward pass against independent tables and a plain NumPy network."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import DropPath, GFNet
from gfnet_dynn.models.gfnet_pyramid import GFNetPyramid

PUBLISHED = {
    "gfnet-ti": 7_511_784,
    "gfnet-xs": 15_985_768,
    "gfnet-s": 24_869_608,
    "gfnet-b": 43_120_616,
    "gfnet-h-ti": 15_085_096,
    "gfnet-h-s": 32_162_632,
    "gfnet-h-b": 53_744_200,
}
# data set: (pixels, classes, plain parameters at width 384, 256, 192)
DATA_SETS = {
    "UCM": (256, 21, 15_926_805, 7_472_149, 4_424_469),
    "NWPU": (256, 45, 15_936_045, 7_478_317, 4_429_101),
    "NaSC": (128, 10, 14_890_378, 6_781_194, 3_906_250),
    "PatternNet": (256, 38, 15_933_350, 7_476_518, 4_427_750),
    "AID": (600, 30, 21_509_406, 11_193_886, 7_215_774),
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def official_shapes(dim, depth, grid, patch, classes):
    """Names and shapes of the official isotropic files, written down without the model."""
    shapes = {
        "pos_embed": (1, grid * grid, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (dim,),
            f"blocks.{i}.norm1.bias": (dim,),
            f"blocks.{i}.filter.complex_weight": (grid, grid // 2 + 1, dim, 2),
            f"blocks.{i}.norm2.weight": (dim,),
            f"blocks.{i}.norm2.bias": (dim,),
            f"blocks.{i}.mlp.fc1.weight": (4 * dim, dim),
            f"blocks.{i}.mlp.fc1.bias": (4 * dim,),
            f"blocks.{i}.mlp.fc2.weight": (dim, 4 * dim),
            f"blocks.{i}.mlp.fc2.bias": (dim,),
        }
    return shapes | {
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_counts_of_the_seven(arch):
    with torch.device("meta"):
        model = build_gfnet(arch, img_size=224, num_classes=1000)
    assert count(model) == PUBLISHED[arch]


@pytest.mark.parametrize("name", DATA_SETS)
def test_parameter_counts_on_the_five_data_sets(name):
    pixels, classes, *expected = DATA_SETS[name]
    for dim, number in zip((384, 256, 192), expected, strict=True):
        with torch.device("meta"):
            model = GFNet(img_size=pixels, num_classes=classes, embed_dim=dim, depth=12)
        assert count(model) == number


@pytest.mark.parametrize("patch, millions", [(15, 22.82), (30, 17.42)])
def test_aid_with_other_patches(patch, millions):
    with torch.device("meta"):
        model = build_gfnet("gfnet-xs", img_size=600, num_classes=30, patch_size=patch)
    assert math.floor(count(model) / 1e4) / 100 == millions  # its table truncates


def test_official_file_loads_strictly(tmp_path):
    shapes = official_shapes(256, 12, 14, 16, 1000)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"model": state}, tmp_path / "gfnet-ti.pth")
    model = build_gfnet("gfnet-ti", img_size=224, num_classes=1000)
    read = torch.load(tmp_path / "gfnet-ti.pth", weights_only=True)["model"]
    model.load_state_dict(read, strict=True)
    assert torch.equal(model.blocks[7].mlp.fc2.weight, state["blocks.7.mlp.fc2.weight"])


def test_pyramid_names_and_shapes():
    dims, depths, grids = (64, 128, 256, 512), (3, 3, 10, 3), (56, 28, 14, 7)
    expected = {
        "pos_embed": (1, 56 * 56, 64),
        "patch_embed.0.proj.weight": (64, 3, 4, 4),
        "patch_embed.0.proj.bias": (64,),
        "norm.weight": (512,),
        "norm.bias": (512,),
        "head.weight": (1000, 512),
        "head.bias": (1000,),
    }
    for s in range(1, 4):
        expected[f"patch_embed.{s}.proj.weight"] = (dims[s], dims[s - 1], 2, 2)
        expected[f"patch_embed.{s}.proj.bias"] = (dims[s],)
    for s, (dim, depth, grid) in enumerate(zip(dims, depths, grids, strict=True)):
        for i in range(depth):
            name = f"blocks.{s}.{i}."
            expected[name + "filter.complex_weight"] = (grid, grid // 2 + 1, dim, 2)
            expected[name + "mlp.fc1.weight"] = (4 * dim, dim)
            expected[name + "mlp.fc1.bias"] = (4 * dim,)
            expected[name + "mlp.fc2.weight"] = (dim, 4 * dim)
            vectors = ("mlp.fc2.bias", "gamma", "norm1.weight", "norm1.bias")
            for vector in (*vectors, "norm2.weight", "norm2.bias"):
                expected[name + vector] = (dim,)
    with torch.device("meta"):
        model = build_gfnet("gfnet-h-ti", img_size=224, num_classes=1000)
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == expected


def test_pyramid_runs_at_other_sizes_and_starts_near_its_stem():
    torch.manual_seed(0)
    model = GFNetPyramid(
        img_size=(72, 64), num_classes=5, embed_dim=(8, 16, 24), depth=(1, 2, 1), layer_scale=0.0
    )
    x = torch.randn(2, 3, 72, 64)
    assert model.grid == (18, 16)
    embedding, logits = model(x, embed=True)
    assert logits.shape == (2, 5) and torch.equal(logits, model.head(embedding))
    # LayerScale 0 leaves only the convolutions between stages.
    with torch.no_grad():
        grid = model.patch_embed[0].proj(x) + model.pos_embed.view(1, 18, 16, 8).permute(0, 3, 1, 2)
        for stage in (1, 2):
            grid = model.patch_embed[stage].proj(grid)
        expected = model.norm(grid.flatten(2).transpose(1, 2)).mean(1)
    assert torch.allclose(embedding, expected, atol=1e-5)
    with torch.no_grad():
        for stage in model.blocks:
            for block in stage:
                block.gamma.fill_(1.0)
        changed = model(x)
        model.set_filter("fft")
        assert torch.allclose(model(x), changed, atol=1e-5)
    assert not torch.allclose(changed, logits, atol=1e-3)


def numpy_gfnet(state, x, patch, grid, depth):
    """The network once more, float64, one image, no library function beyond FFT and erf."""
    p = {name: value.double().numpy() for name, value in state.items()}

    def norm(z, name):
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
        return z * p[name + ".weight"] + p[name + ".bias"]

    (h, w), (ph, pw) = grid, patch
    tokens = []
    for a in range(h):
        for b in range(w):
            piece = x[:, a * ph : (a + 1) * ph, b * pw : (b + 1) * pw]
            tokens.append((p["patch_embed.proj.weight"] * piece).sum((1, 2, 3)))
    z = np.stack(tokens) + p["patch_embed.proj.bias"] + p["pos_embed"][0]
    for i in range(depth):
        name = f"blocks.{i}."
        y = norm(z, name + "norm1").reshape(h, w, -1)
        k = p[name + "filter.complex_weight"]
        spectrum = np.fft.rfft2(y, axes=(0, 1)) * (k[..., 0] + 1j * k[..., 1])
        y = np.fft.irfft2(spectrum, s=grid, axes=(0, 1)).reshape(h * w, -1)
        y = norm(y, name + "norm2") @ p[name + "mlp.fc1.weight"].T + p[name + "mlp.fc1.bias"]
        y = y * (1 + erf(y / math.sqrt(2))) / 2
        z = z + y @ p[name + "mlp.fc2.weight"].T + p[name + "mlp.fc2.bias"]
    embedding = norm(z, "norm").mean(0)
    return embedding, embedding @ p["head.weight"].T + p["head.bias"]


@pytest.mark.parametrize(
    "size, patch", [(32, 8), ((32, 48), 8), ((35, 50), (8, 16)), (37, 5)], ids=str
)
@pytest.mark.parametrize("form", ["fft", "dft", "dft-dense", "auto"])
def test_forward_is_the_numpy_network_on_any_grid(size, patch, form):
    torch.manual_seed(0)
    model = GFNet(
        img_size=size, patch_size=patch, num_classes=4, embed_dim=12, depth=2, filter=form
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, *model.img_size)
    embedding, logits = model(x, embed=True)
    for i in range(2):
        truth = numpy_gfnet(
            model.state_dict(), x[i].double().numpy(), model.patch_size, model.grid, 2
        )
        assert np.allclose(embedding[i].detach().numpy(), truth[0], atol=2e-5)
        assert np.allclose(logits[i].detach().numpy(), truth[1], atol=2e-5)


def test_trailing_pixels_are_dropped():
    torch.manual_seed(0)
    model = GFNet(img_size=35, patch_size=8, num_classes=4, embed_dim=8, depth=1)
    x = torch.randn(1, 3, 35, 35)
    changed = x.clone()
    changed[:, :, 32:], changed[:, :, :, 32:] = 9, 9
    assert model.grid == (4, 4) and torch.equal(model(x), model(changed))


def test_tokens_blocks_and_embedding_fit_together():
    torch.manual_seed(0)
    model = GFNet(img_size=32, patch_size=8, num_classes=4, embed_dim=8, depth=3)
    x = torch.randn(2, 3, 32, 32)
    assert model.tokens(x).shape == (2, 16, 8)
    second, first = model.block_tokens(x, [2, 0])
    assert torch.equal(second, model.tokens(x))
    assert torch.equal(first, model.blocks[0](model.stem(x)))
    assert torch.allclose(model.embed(x), model.norm(model.tokens(x)).mean(1))
    with pytest.raises(ValueError, match=r"got \[3\], expected 0 to 2"):
        model.block_tokens(x, [1, 3])


def test_set_filter_keeps_weights_and_output():
    torch.manual_seed(0)
    model = GFNet(img_size=40, patch_size=8, num_classes=4, embed_dim=8, depth=2, filter="fft")
    x = torch.randn(2, 3, 40, 40)
    state, before = {n: v.clone() for n, v in model.state_dict().items()}, model(x)
    for form in ("dft", "dft-dense", "auto"):
        model.set_filter(form)
        assert torch.allclose(model(x), before, atol=1e-6)
        assert model.state_dict().keys() == state.keys()
        assert model.blocks[0].filter.tables is model.blocks[1].filter.tables
    assert model.config()["filter"] == "auto"


def test_config_rebuilds_and_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    model = build_gfnet("gfnet-s", img_size=64, num_classes=7, embed_dim=48, depth=5)
    again = GFNet(**model.config())
    assert again.config() == model.config()
    again.load_state_dict(model.state_dict())
    assert [round(b.drop_path.rate, 4) for b in model.blocks] == [0, 0.0375, 0.075, 0.1125, 0.15]
    assert model.head.bias.abs().max() == 0 and model.blocks[0].mlp.fc1.bias.abs().max() == 0
    for weight in (model.pos_embed, model.blocks[1].mlp.fc1.weight):
        assert 0.015 < weight.std().item() < 0.025
    assert model.norm.eps == 1e-6


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    values = out.flatten(1)
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(values.amin(1), values.amax(1))
    assert abs(out.mean().item() - 1) < 0.03
    assert torch.equal(drop.eval()(x), x)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="got 'gfnet-xl', expected one of"):
        build_gfnet("gfnet-xl", img_size=224, num_classes=10)
    with pytest.raises(ValueError, match="expected at least one patch"):
        GFNet(img_size=8, patch_size=16, num_classes=2, embed_dim=8, depth=1)
    with pytest.raises(ValueError, match="num_classes: got 0, expected at least 1"):
        GFNet(img_size=16, num_classes=0, embed_dim=8, depth=1)
    with pytest.raises(ValueError, match=r"expected \[0, 1\)"):
        GFNet(img_size=16, num_classes=2, embed_dim=8, depth=2, drop_path_rate=1.0)
    with pytest.raises(ValueError, match="too small for 4 stages"):
        build_gfnet("gfnet-h-ti", img_size=16, num_classes=2)
    with pytest.raises(ValueError, match="as many positive widths as depths"):
        GFNetPyramid(img_size=32, num_classes=2, embed_dim=(8, 8), depth=(1,))
    model = GFNet(img_size=16, num_classes=2, embed_dim=8, depth=1)
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 17, 16\), expected \(N, 3, 16, 16\)"):
        model(torch.zeros(1, 3, 17, 16))
    with pytest.raises(ValueError, match="img_size"):
        GFNet(img_size=(16, 16, 3), num_classes=2, embed_dim=8, depth=1)
