"""Reconstruction: starts at the weight, ends on the grid, and beats rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from mpkd.model.student import SimpleCNN
from mpkd.quant import brecq
from mpkd.quant.brecq import (
    LearnedRounding,
    beta_at,
    learn_input_scales,
    reconstruct,
    units_of,
)
from mpkd.quant.layers import (
    QuantLayer,
    calibrate,
    fold_batch_norms,
    quant_layers,
    quantizable,
    quantize_net,
)
from mpkd.quant.shipped import plain


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
    units = units_of(quantized)
    names = [unit.names[0] for unit in units]
    assert names[0] == "conv1" and names[-1] == "fc" and "layer3.1" in names and len(units) == 10
    assert [unit.name for unit in units][:2] == ["layer conv1", "block layer1.0"]
    held = [n for unit in names for n in quant_layers(quantized)
            if n == unit or n.startswith(unit + ".")]  # fmt: skip
    assert sorted(held) == sorted(quant_layers(quantized)) and len(set(held)) == len(held)


def test_without_a_block_a_layer_is_judged_behind_its_activation():
    """AdaRound's unit: what a ReLU takes away anyhow is no error of the rounding."""
    quantized = quantize_net(net(), {"0": 2, "2": 2, "6": 2})
    units = units_of(quantized)
    assert [unit.names for unit in units] == [("0", "1"), ("2", "3"), ("6",)]
    assert units[0].name == "layer 0"
    cnn = quantize_net(SimpleCNN(3, widths=(4,)).eval(), {"features.0.0": 2})
    whole = tuple(f"features.0.{n}" for n in range(4))
    assert units_of(cnn)[0].names[:1] == whole[:1]  # the norm is in between here
    folded = fold_batch_norms(SimpleCNN(3, widths=(4,)))
    assert units_of(quantize_net(folded, {"features.0.0": 2}))[0].names == whole
    images = torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        quantized[0].base.bias.fill_(-100.0)  # nothing comes through the ReLU
    found = reconstruct(quantized, plain(quantized), [images], steps=1)
    assert found[0].before == 0.0


def test_the_second_unit_learns_from_the_quantized_input():
    """Its input is that of the network quantized so far, its target the original's output."""
    quantized = quantize_net(net(), {"0": 2, "2": 3}, symmetric=False)
    images, seen = torch.rand(16, 3, 8, 8), []
    real = brecq._reconstruct_unit

    def noting(net_, unit, inputs, targets, **more):
        seen.append((inputs.clone(), targets.clone()))
        return real(net_, unit, inputs, targets, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brecq, "_reconstruct_unit", noting)
        original = net()
        reconstruct(quantized, original, [images], steps=30, learning_rate=0.1)
    with torch.no_grad():
        given, rounded = original[:2](images), quantized[:2](images)
        torch.testing.assert_close(seen[1][0], rounded)
        torch.testing.assert_close(seen[1][1], original[:4](images))
    assert not torch.allclose(given, rounded, atol=1e-3)  # so that the test can tell them apart


def output_error(quantized: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((quantized(images) - net()(images)).square().mean())


@pytest.mark.parametrize("a_bits", [32, 4])
def test_two_bits_come_much_closer_to_the_original(a_bits):
    torch.manual_seed(1)
    images = torch.rand(96, 3, 12, 12)
    quantized = net()
    names = quantizable(quantized)
    quantize_net(quantized, dict.fromkeys(names, 2), dict.fromkeys(names, a_bits), symmetric=False)
    if a_bits != 32:
        calibrate(quantized, [images])
    nearest = output_error(quantized, images)
    generator = torch.Generator().manual_seed(0)
    found = reconstruct(
        quantized,
        net(),
        images.split(32),
        steps=200,
        learning_rate=3e-2,
        strength=1e-4,  # the outputs of this untrained net are a hundredth of a trained one's
        generator=generator,
    )
    assert [one.name for one in found] == [f"layer {name}" for name in names]
    assert all(one.after <= one.before * 1.02 for one in found)
    learned = output_error(quantized, images)
    assert learned < 0.3 * nearest
    for layer in quant_layers(quantized).values():  # rounding again moves nothing
        torch.testing.assert_close(layer.quantized_weight(), layer.base.weight, rtol=0, atol=1e-5)
    if a_bits != 32:
        before = {n: layer.base.weight.clone() for n, layer in quant_layers(quantized).items()}
        scaled = learn_input_scales(
            quantized, net(), images.split(32), steps=100, generator=generator
        )
        assert len(scaled) == 3 and all(one.after <= 1.1 * one.before for one in scaled)
        assert output_error(quantized, images) < 0.3 * nearest
        for name, layer in quant_layers(quantized).items():
            assert torch.equal(layer.base.weight, before[name])


def test_the_same_seed_rounds_the_same():
    images, weights = torch.rand(16, 3, 8, 8), []
    for _ in range(2):
        quantized = quantize_net(net(), {"0": 3})
        reconstruct(
            quantized, net(), [images], steps=20, generator=torch.Generator().manual_seed(3)
        )
        weights.append(quant_layers(quantized)["0"].base.weight.detach().clone())
    assert torch.equal(*weights)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no quantized layer"):
        reconstruct(net(), net(), [torch.rand(2, 3, 8, 8)], steps=1)
    with pytest.raises(ValueError, match="training mode"):
        reconstruct(quantize_net(net(), {"0": 3}).train(), net(), [torch.rand(2, 3, 8, 8)], steps=1)
    with pytest.raises(ValueError, match="not quantized"):
        LearnedRounding(QuantLayer(nn.Linear(2, 2), w_bits=32))
