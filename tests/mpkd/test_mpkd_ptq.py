"""Post-training quantization: integers rebuild the weight, plain networks give the same answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.model.student import SimpleCNN
from mpkd.quant.layers import QuantLayer, quant_layers, quantizable
from mpkd.quant.ptq import float_net, from_integers, quantize_trained, stored_integers


def student() -> nn.Module:
    torch.manual_seed(0)
    net = SimpleCNN(5, widths=(6, 8))
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8) + 0.5)  # running statistics that are not 0 and 1
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)  # negative factors too
    return net.eval()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_stored_integers_rebuild_the_weight(symmetric):
    name = "features.1.0"
    net = quantize_trained(student(), {name: 3}, calibration=None, symmetric=symmetric)
    layer = quant_layers(net)[name]
    integers, scale, offset = stored_integers(layer)
    low, high = (-3, 3) if symmetric else (0, 7)
    assert integers.dtype == torch.int32
    assert low <= int(integers.min()) <= int(integers.max()) <= high
    wanted = scale.numpy()[:, None, None, None] * (
        integers.numpy() - offset.numpy()[:, None, None, None]
    )
    np.testing.assert_allclose(layer.quantized_weight().detach().numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(from_integers(integers, scale, offset).numpy(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="not quantized"):
        stored_integers(QuantLayer(nn.Linear(2, 2), w_bits=32))


@pytest.mark.parametrize("fold", [True, False])
def test_the_plain_network_answers_alike(fold):
    net = student()
    names = quantizable(net)
    quantized = quantize_trained(net, dict.fromkeys(names, 4), calibration=None, fold=fold)
    plain = float_net(quantized)
    assert not any(isinstance(m, (QuantLayer, nn.BatchNorm2d)) for m in plain.modules())
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(plain(images), quantized(images), rtol=1e-4, atol=1e-4)
    for name in names:  # folding keeps a symmetric grid: at most 15 values a channel
        for row in (
            plain.get_submodule(name)
            .weight.detach()
            .reshape(plain.get_submodule(name).weight.shape[0], -1)
        ):
            step = row.abs()[row.abs() > 1e-9].min()
            assert len(torch.unique((row / step * 840).round())) <= 15


def test_only_what_is_asked_for_is_quantized():
    net = student()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randn(32, 3, 8, 8)
    quantized = quantize_trained(
        net,
        {"features.0.0": 32, "features.1.0": 32, "classifier": 8},
        {"features.1.0": 8},
        calibration=images,
    )
    assert set(quant_layers(quantized)) == {"features.1.0", "classifier"}
    layer = quant_layers(quantized)["features.1.0"]
    assert (layer.w_bits, layer.a_bits) == (32, 8) and bool(layer.input_quantizer.ready)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    same = quantize_trained(net, {}, calibration=None)
    torch.testing.assert_close(same(images), net(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no calibration images"):
        quantize_trained(net, {"classifier": 8}, {"classifier": 8}, calibration=None)


def test_eight_bits_hardly_change_a_trained_network(mpkd_digits):
    names = quantizable(mpkd_digits.net)
    eight = dict.fromkeys(names, 8)
    quantized = quantize_trained(mpkd_digits.net, eight, eight, calibration=mpkd_digits.calibration)
    assert mpkd_digits.evaluate(quantized) >= mpkd_digits.accuracy - 0.02
    worst = quantize_trained(mpkd_digits.net, dict.fromkeys(names, 2), calibration=None)
    assert mpkd_digits.evaluate(worst) < mpkd_digits.accuracy - 0.1  # the test above can fail
