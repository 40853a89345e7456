"""Costs by formula against the published figures and torch's own counter."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.op_counter import layer_costs, model_macs
from shared_core.metrics import cost


def counted(model):
    x = torch.empty(1, 3, *model.img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "arch, published, total",
    [
        ("gfnet-ti", 1.285e9, 2_543_833_088),
        ("gfnet-xs", 2.853e9, 5_665_437_696),
        ("gfnet-s", 4.483e9, 8_902_391_808),
        ("gfnet-b", 7.930e9, 15_774_752_768),
    ],
)
def test_published_macs_and_torchs_counter(arch, published, total):
    with torch.device("meta"):
        model = build_gfnet(arch, img_size=224, num_classes=1000, filter="fft")
    assert model_macs(model) == pytest.approx(published, rel=5e-4)
    products = [c for c in layer_costs(model) if "fft" not in c.name]
    assert cost.total_macs(products) * 2 == total == counted(model)


@pytest.mark.parametrize("arch", ["gfnet-h-ti", "gfnet-h-b"])
def test_pyramids_agree_with_torchs_counter_and_their_parameters(arch):
    with torch.device("meta"):
        model = build_gfnet(arch, img_size=224, num_classes=1000, filter="fft")
    layers = layer_costs(model)
    assert sum(c.macs for c in layers if "fft" not in c.name) * 2 == counted(model)
    assert cost.total_params(layers) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size, patch", [(600, 16), ((100, 70), (16, 8)), (33, 4)])
def test_any_grid(size, patch):
    with torch.device("meta"):
        model = GFNet(
            img_size=size, patch_size=patch, num_classes=7, embed_dim=24, depth=3, filter="fft"
        )
    layers = layer_costs(model)
    assert sum(c.macs for c in layers if "fft" not in c.name) * 2 == counted(model)
    assert cost.total_params(layers) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "pixels, classes, millions",
    [
        (256, 21, (1292.8, 1901.7, 2510.6, 3119.5, 3728.4)),
        (128, 10, (322.9, 475.0, 627.1, 779.2, 931.3)),
        (600, 30, (6921, 10181, 13441, 16701, 19961)),
    ],
)
def test_costs_per_exit_of_the_three_data_set_sizes(pixels, classes, millions):
    with torch.device("meta"):
        model = GFNetDynn(build_gfnet("gfnet-xs", img_size=pixels, num_classes=classes))
    costs = model.exit_costs()
    assert costs.dtype == np.float64 and costs.shape == (5,)
    assert np.allclose(costs / 1e6, millions, rtol=2e-4)
    assert np.allclose(costs / costs[-1], [0.347, 0.510, 0.673, 0.837, 1], atol=1e-3)


def test_costs_per_exit_by_hand():
    n, d, k, h, half = 16, 8, 3, 4, 3
    with torch.device("meta"):
        backbone = GFNet(img_size=32, patch_size=8, num_classes=k, embed_dim=d, depth=4)
        model = GFNetDynn(backbone, (0, 2))
        identity = GFNetDynn(backbone, (0, 2), gate="identity")
    fft = n * d * math.ceil(math.log2(n)) + h * half * d * math.ceil(math.log2(h * half))
    block = 8 * n * d * d + fft + 2 * 5 * n * d
    patch, leave = n * 3 * 64 * d, 5 * n * d + d * k
    truth = [
        patch + block + leave + 4,
        patch + 3 * block + 2 * (leave + 4),
        patch + 4 * block + 3 * leave + 8,
    ]
    assert model.exit_costs().tolist() == truth
    assert identity.exit_costs().tolist() == [truth[0] - 4, truth[1] - 8, truth[2] - 8]
    assert model_macs(backbone) == patch + 4 * block + leave
