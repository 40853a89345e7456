"""Reconstruction: starts at the weight, ends on the grid, and beats rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from mpkd.quant.brecq import (
    LearnedRounding,
    beta_at,
    blocks_of,
    is_on_grid,
    learn_input_scales,
    reconstruct,
)
from mpkd.quant.layers import (
    QuantLayer,
    calibrate,
    fold_batch_norms,
    quant_layers,
    quantizable,
    quantize_net,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_rounding_begins_at_the_weight_and_ends_up_or_down():
    layer = QuantLayer(nn.Linear(6, 3), w_bits=4, symmetric=False)
    rounding = LearnedRounding(layer)
    inside = (rounding.floor + rounding.zero >= 0) & (rounding.floor + rounding.zero < 15)
    inside &= (rounding.up() > 2e-4) & (rounding.up() < 1 - 2e-4)
    assert inside.any()
    torch.testing.assert_close(
        rounding.weight()[inside], layer.base.weight[inside], rtol=0, atol=1e-5
    )
    steps = ((rounding.weight(hard=True) / rounding.scale) - rounding.floor)[inside]
    assert set(steps.round().detach().tolist()) <= {0.0, 1.0}
    # Undecided at the fraction one half, decided beyond it: hard rounding is to the nearest here.
    nearest = (layer.base.weight / rounding.scale).round()
    torch.testing.assert_close(
        (rounding.weight(hard=True) / rounding.scale)[inside], nearest[inside], rtol=0, atol=1e-4
    )


def test_the_regulariser_is_zero_when_all_is_decided():
    rounding = LearnedRounding(QuantLayer(nn.Linear(6, 3), w_bits=4))
    with torch.no_grad():
        rounding.alpha.copy_(torch.where(torch.rand(3, 6) > 0.5, 10.0, -10.0))
    assert rounding.regulariser(2.0).item() == pytest.approx(0)
    with torch.no_grad():
        rounding.alpha.zero_()  # h = 1/2
    assert rounding.regulariser(2.0).item() == pytest.approx(18)


def test_beta_falls_from_twenty_to_two_after_a_fifth():
    found = [beta_at(step, 100) for step in (0, 19, 20, 60, 99, 100)]
    assert found[:2] == [None, None]
    np.testing.assert_allclose(found[2:], [20, 11, 2.225, 2])


def test_blocks_are_whole_and_cover_every_layer_once():
    quantized = fold_batch_norms(resnet18(num_classes=4))
    quantize_net(quantized, dict.fromkeys(quantizable(quantized), 4), method="minmax")
    units = blocks_of(quantized)
    assert units[0] == "conv1" and units[-1] == "fc" and "layer3.1" in units and len(units) == 10
    held = [n for unit in units for n in quant_layers(quantized)
            if n == unit or n.startswith(unit + ".")]  # fmt: skip
    assert sorted(held) == sorted(quant_layers(quantized)) and len(set(held)) == len(held)


def output_error(quantized: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((quantized(images) - net()(images)).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("a_bits", [32, 4])
def test_two_bits_come_much_closer_to_the_original(a_bits):
    torch.manual_seed(1)
    images = torch.rand(128, 3, 12, 12)
    quantized = net()
    names = quantizable(quantized)
    quantize_net(quantized, dict.fromkeys(names, 2), dict.fromkeys(names, a_bits), symmetric=False)
    if a_bits != 32:
        calibrate(quantized, [images])
    nearest = output_error(quantized, images)
    generator = torch.Generator().manual_seed(0)
    found = reconstruct(
        quantized,
        images.split(32),
        steps=300,
        learning_rate=1e-2,
        strength=1e-4,  # the outputs of this untrained net are a hundredth of a trained one's
        generator=generator,
    )
    assert [one.name for one in found] == names
    assert all(one.after <= one.before * 1.02 for one in found)
    learned = output_error(quantized, images)
    assert learned < 0.3 * nearest
    assert all(is_on_grid(layer) for layer in quant_layers(quantized).values())
    if a_bits != 32:
        before = {n: layer.base.weight.clone() for n, layer in quant_layers(quantized).items()}
        scaled = learn_input_scales(quantized, images.split(32), steps=100, generator=generator)
        assert len(scaled) == 3 and all(one.after <= one.before for one in scaled)
        assert output_error(quantized, images) < 0.3 * nearest
        for name, layer in quant_layers(quantized).items():
            assert torch.equal(layer.base.weight, before[name])


def test_the_same_seed_rounds_the_same():
    images, weights = torch.rand(16, 3, 8, 8), []
    for _ in range(2):
        quantized = quantize_net(net(), {"0": 3})
        reconstruct(quantized, [images], steps=20, generator=torch.Generator().manual_seed(3))
        weights.append(quant_layers(quantized)["0"].base.weight.detach().clone())
    assert torch.equal(*weights)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no quantized layer"):
        reconstruct(net(), [torch.rand(2, 3, 8, 8)], steps=1)
    with pytest.raises(ValueError, match="training mode"):
        reconstruct(quantize_net(net(), {"0": 3}).train(), [torch.rand(2, 3, 8, 8)], steps=1)
    with pytest.raises(ValueError, match="not quantized"):
        LearnedRounding(QuantLayer(nn.Linear(2, 2), w_bits=32))
