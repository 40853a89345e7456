"""Grids, scales, gradients and folding against NumPy, finite tables and torch's own operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from mpkd.quant.cost import bit_operations, layer_facts, mean_bits, size_bytes, weight_bits
from mpkd.quant.fake_quant import Grid, best_scale, fake_quantize, scale_from_range
from mpkd.quant.layers import (
    QuantLayer,
    bits_for,
    calibrate,
    fold_batch_norms,
    quant_layers,
    quantizable,
    quantize_net,
    unquantized,
)
from mpkd.quant.quantizers import ActivationQuantizer, WeightQuantizer
from shared_core.for_torch.cost import layer_costs


@pytest.mark.parametrize(
    ("grid", "ends"),
    [
        (Grid(8, signed=False), (0, 255)),
        (Grid(8, signed=True), (-128, 127)),
        (Grid(8, signed=True, narrow=True), (-127, 127)),
        (Grid(2, signed=True), (-2, 1)),
        (Grid(2, signed=False), (0, 3)),
    ],
)
def test_the_ends_of_grids(grid, ends):
    assert (grid.low, grid.high) == ends


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_are_torchs_own(bits):
    """torch.fake_quantize_per_channel_affine is another implementation of the same grid."""
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3)
    for symmetric in (True, False):
        grid = Grid(bits, signed=symmetric)
        rows = weight.reshape(5, -1)
        scale, zero = scale_from_range(rows.amin(1), rows.amax(1), grid, symmetric=symmetric)
        wanted = torch.fake_quantize_per_channel_affine(
            weight, scale, zero.to(torch.int32), 0, grid.low, grid.high
        )
        found = fake_quantize(weight, scale.view(-1, 1, 1, 1), zero.view(-1, 1, 1, 1), grid)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def eq3(x: np.ndarray, s: float, low: int, high: int, z: int = 0):
    """Values and gradients of LSQ's equations 1 to 3 (of LSQ+ with an offset), in float64."""
    v = x / s
    inside, below = (low - z < v) & (v < high - z), v <= low - z
    held = np.clip(v, low - z, high - z)
    value = s * np.round(held)
    dx = inside.astype(np.float64)
    ds = np.where(inside, np.round(v) - v, np.where(below, low - z, high - z))
    dz = np.where(inside, 0.0, -s)
    return value, dx, ds, dz


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("signed", "narrow", "zero"),
    [(True, True, None), (True, False, None), (False, False, None), (False, False, 1)],
    ids=["weights", "weights of all levels", "inputs", "inputs with an offset"],
)
def test_values_and_gradients_are_those_of_the_paper_everywhere(bits, signed, narrow, zero):
    """On a dense grid that reaches beyond both ends, ends and halves included."""
    grid, s = Grid(bits, signed=signed, narrow=narrow), 0.25
    points = np.arange(4 * (grid.low - 2), 4 * (grid.high + 2) + 1) / 4 * s  # quarters of a step
    points = np.concatenate([points, points + 0.013])
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(s, dtype=torch.float64).expand(len(points)).clone().requires_grad_()
    offset = None if zero is None else torch.full_like(scale, zero).requires_grad_()
    found = fake_quantize(x, scale, offset, grid)
    found.sum().backward()
    value, dx, ds, dz = eq3(points, s, grid.low, grid.high, zero or 0)
    np.testing.assert_allclose(found.detach().numpy(), value, atol=1e-12)
    np.testing.assert_array_equal(x.grad.numpy(), dx)
    np.testing.assert_allclose(scale.grad.numpy(), ds, atol=1e-9)
    if offset is not None:
        np.testing.assert_allclose(offset.grad.numpy(), dz, atol=1e-12)


def test_modules_pass_the_papers_gradients_on_with_its_factor():
    torch.manual_seed(0)
    weight = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    quantizer = WeightQuantizer(weight, bits=2, learned=True)
    quantizer(weight).sum().backward()
    share = float((weight.grad != 0).double().mean())
    parts = zip(weight.detach().numpy(), quantizer.scale.detach().numpy(), strict=True)
    truths = [eq3(row, float(s), -1, 1) for row, s in parts]
    assert share == pytest.approx(np.mean([dx.mean() for _, dx, _, _ in truths]))
    wanted = [ds.sum() / np.sqrt(40 * 1) for _, _, ds, _ in truths]
    np.testing.assert_allclose(quantizer.scale.grad.numpy(), wanted, rtol=1e-6)
    x = torch.rand(8, 3, 5, 5, dtype=torch.float64)
    inputs = ActivationQuantizer(bits=2, learned=True).double()
    inputs.observe(x)
    inputs.set_range()
    inputs(x).sum().backward()
    truth = eq3(x.numpy(), float(inputs.scale.detach()), 0, 3)[2].sum() / np.sqrt(75 * 3)
    assert float(inputs.scale.grad) == pytest.approx(truth, rel=1e-5)


def test_the_searched_range_is_the_best_of_all_that_were_tried():
    values = np.random.default_rng(0).standard_t(2, 400)  # heavy tails
    grid, power = Grid(3, signed=True, narrow=True), 2.4
    errors = {}
    for k in range(80):
        reach = np.abs(values).max() * (1 - 0.01 * k)
        step = reach / grid.high
        shown = np.clip(np.round(values / step), grid.low, grid.high) * step
        errors[step] = (np.abs(shown - values) ** power).mean()
    scale, zero = best_scale(torch.tensor(values), grid, symmetric=True, channels=False)
    # Ends differ where the range is not symmetric: the largest magnitude decides.
    assert float(scale) == pytest.approx(min(errors, key=errors.get), rel=1e-9)
    assert float(zero) == 0


def test_zero_is_exact_and_constants_are_harmless():
    x = torch.tensor([0.0, 3.0, 7.3])
    scale, zero = scale_from_range(x.amin(), x.amax(), Grid(4, signed=False), symmetric=False)
    assert fake_quantize(x, scale, zero, Grid(4, signed=False))[0] == 0
    flat = WeightQuantizer(torch.zeros(3, 4), bits=4)
    assert torch.equal(flat(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_weights_take_at_most_so_many_values():
    weight = torch.randn(6, 50)
    for bits in (2, 3, 8):
        quantizer = WeightQuantizer(weight, bits=bits, symmetric=False)
        shown = quantizer(weight)
        assert all(len(row.unique()) <= 2**bits for row in shown)
        whole = quantizer.integers(weight)
        assert whole.min() >= 0 and whole.max() < 2**bits
        back = (whole - quantizer.zero_point[:, None]) * quantizer.scale[:, None]
        torch.testing.assert_close(back, shown.detach())


def test_inputs_after_relu_have_no_offset_and_others_one():
    after = ActivationQuantizer(bits=4)
    after.observe(torch.rand(1, 100))
    after.set_range()
    assert after.grid == Grid(4, signed=False) and float(after.zero_point) == 0
    both = ActivationQuantizer(bits=4, learned=True)
    both.observe(torch.randn(1, 1000))
    both.set_range(method="minmax")
    assert 0 < both.zero_point.item() < 15
    with torch.no_grad():
        both.zero_point.fill_(99.0)  # learned beyond the grid: zero must stay a value
    assert float(both(torch.zeros(1)).detach()) == 0
    with pytest.raises(ValueError, match="observed"):
        ActivationQuantizer(bits=4).set_range()


def test_ranges_come_from_values_all_over_the_map():
    """Maps of 16 x 16 whose first column is empty: even distances would see that column alone."""
    torch.manual_seed(0)
    images = torch.randn(64, 16, 16, 16).abs()
    images[:, :, :, 0] = 0.0
    quantizer = ActivationQuantizer(bits=3)
    quantizer.observe(images)
    quantizer.set_range()
    truth, _ = best_scale(images, quantizer.grid, symmetric=True, channels=False)
    assert float(quantizer.scale.detach()) == pytest.approx(float(truth), rel=0.06)
    again = ActivationQuantizer(bits=3)
    again.observe(images)
    again.set_range()
    assert torch.equal(again.scale, quantizer.scale)  # the same seed, the same places


def test_what_calibration_found_is_in_the_state(tmp_path):
    torch.manual_seed(0)
    first = ActivationQuantizer(bits=4, learned=True)
    first.observe(torch.randn(10, 10))
    first.set_range()
    other = ActivationQuantizer(bits=4, learned=True)
    other.load_state_dict(first.state_dict())
    x = 5 * torch.randn(50)  # some lie outside the grid
    gradients = []
    for quantizer in (first, other):
        quantizer(x).square().sum().backward()
        gradients.append((quantizer.scale.grad.item(), quantizer.zero_point.grad.item()))
    assert gradients[0] == gradients[1] and all(value != 0 for value in gradients[0])


@pytest.mark.parametrize("make", [resnet18, mobilenet_v2])
def test_folded_networks_compute_the_same(make):
    torch.manual_seed(0)
    net = make(num_classes=4)
    net.train()
    for _ in range(2):
        net(torch.randn(4, 3, 64, 64))  # statistics that are not 0 and 1
    net.eval()
    folded = fold_batch_norms(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(images), net(images), rtol=1e-4, atol=1e-4)


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


def test_sixteen_bits_are_nearly_none_and_two_are_few():
    images = torch.rand(16, 3, 8, 8)
    net = tiny().eval()
    wanted = net(images)
    for bits, close in ((16, True), (2, False)):
        other = tiny().eval()
        names = quantizable(other)
        quantize_net(other, dict.fromkeys(names, bits), dict.fromkeys(names, bits))
        calibrate(other, [images])
        assert torch.allclose(other(images), wanted, atol=1e-3) == close
        with unquantized(other):
            torch.testing.assert_close(other(images), wanted)


def test_calibration_sees_the_inputs_of_the_unquantized_network():
    images = torch.rand(16, 3, 8, 8)
    net = tiny().eval()
    names = quantizable(net)
    quantize_net(net, dict.fromkeys(names, 2), dict.fromkeys(names, 8))
    calibrate(net, [images[:8], images[8:]], method="minmax")
    inner = tiny().eval()
    reach = inner[:2](images).max().item()
    layer = quant_layers(net)["2"]
    assert float(layer.input_quantizer.scale) == pytest.approx(reach / 255, rel=1e-4)


def test_costs_by_hand():
    net = tiny()
    facts = {fact.name: fact for fact in layer_facts(net, 8)}
    assert (facts["0"].weights, facts["0"].macs) == (108, 108 * 64)
    assert (facts["2"].weights, facts["2"].macs) == (108, 108 * 36)
    assert (facts["6"].weights, facts["6"].macs) == (12, 12)
    bits = {"0": 8, "2": 2, "6": 8}
    every = list(facts.values())
    assert weight_bits(every, bits) == 108 * 8 + 108 * 2 + 12 * 8
    assert mean_bits(every, bits) == pytest.approx((108 * 10 + 96) / 228)
    assert bit_operations(every, bits, bits) == 108 * 64 * 64 + 108 * 36 * 4 + 12 * 64
    biases, scales = 4 + 6 + 2, 4 + 6 + 2
    wanted = (weight_bits(every, bits) + 32 * (biases + scales) + 7) // 8
    assert size_bytes(net, every, bits) == wanted
    quantize_net(net, bits)
    assert layer_facts(net, 8) == every
    assert size_bytes(net, every, bits) == wanted


def test_macs_are_the_cores():
    net = resnet18(num_classes=4).eval()
    ours = sum(fact.macs for fact in layer_facts(net, 64))
    core = layer_costs(net, torch.zeros(1, 3, 64, 64))
    kinds = {n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert ours == sum(cost.macs for cost in core if cost.name in kinds)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grid(1, signed=True), "1 bits"),
        (lambda: Grid(4, signed=False, narrow=True), "narrow"),
        (lambda: WeightQuantizer(torch.ones(2, 2), bits=4, method="kl"), "'kl'"),
        (lambda: QuantLayer(nn.ReLU(), w_bits=4), "ReLU"),
        (lambda: quantize_net(tiny(), {"9": 4}), "'9'"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_first_and_last_keep_eight_bits():
    assert bits_for(["a", "b", "c"], 2) == {"a": 8, "b": 2, "c": 8}
    assert bits_for(["a", "b", "c"], 2, first_last=None) == {"a": 2, "b": 2, "c": 2}
