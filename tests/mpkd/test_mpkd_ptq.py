"""Post-training quantization, and the form that is shipped: whole numbers, packed and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.model.student import SimpleCNN
from mpkd.quant.layers import QuantLayer, quant_layers, quantizable, quantize_trained
from mpkd.quant.shipped import (
    from_integers,
    pack_bits,
    plain,
    shipped,
    stored_integers,
    unpack_bits,
)
from mpkd.utils.common import describe_net, load_net, save_packed
from mpkd.utils.config import load_config
from shared_core import checkpoints


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
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_shipped_answers_as_what_was_trained(fold, symmetric):
    """Norms behind quantized layers fold into the grids, with factors of either sign."""
    net, images = student(), torch.randn(32, 3, 8, 8)
    names = quantizable(net)
    four = dict.fromkeys(names, 4)
    quantized = quantize_trained(
        net, four, dict.fromkeys(names, 8), calibration=images, fold=fold, symmetric=symmetric
    )
    made = shipped(quantized)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    with torch.no_grad():
        wanted = quantized(images)
        torch.testing.assert_close(made(images), wanted, rtol=1e-2, atol=1e-2)
    for name, layer in quant_layers(made).items():
        integers, scale, offset = stored_integers(layer)
        back = from_integers(integers, scale, offset)
        assert torch.equal(back, layer.base.weight), name  # bit for bit
        assert torch.equal(layer.quantized_weight(), layer.base.weight), name
        assert int(integers.max() - integers.min()) <= 15
    bare = plain(made)
    assert not quant_layers(bare) and quant_layers(made)
    assert torch.equal(bare.classifier.weight, quant_layers(made)["classifier"].base.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_bits_are_packed_and_come_back(bits):
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, 1001)
    packed = pack_bits(values, bits)
    assert packed.dtype == np.uint8 and len(packed) == -(-1001 * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, 1001), values)
    by_hand = sum(int(v) << (bits * n) for n, v in enumerate(values[:8]))  # least bits first
    assert by_hand == int.from_bytes(packed[:bits].tobytes(), "little")


@pytest.mark.parametrize(("w", "a", "symmetric"), [(2, 4, True), (3, 8, False), (4, 32, True)])
def test_a_packed_file_is_small_and_is_the_network_bit_for_bit(tmp_path, w, a, symmetric):
    config = load_config(None, ["model.student_widths=[16, 32]"])
    about = describe_net("student", config, image_size=8)
    torch.manual_seed(1)
    net, images = SimpleCNN(5, widths=(16, 32)).eval(), torch.randn(16, 3, 8, 8)
    names = quantizable(net)
    inputs = dict.fromkeys(names, a)
    made = shipped(quantize_trained(
        net, dict.fromkeys(names, w), inputs, calibration=images, symmetric=symmetric, fold=False
    ))  # fmt: skip
    facts = checkpoints.make_facts(
        project="mpkd", architecture="simple_cnn", class_names=list("abcde"), framework="torch",
        net=about,
    )  # fmt: skip
    path = tmp_path / "packed.safetensors"
    size = save_packed(path, made, facts)
    arrays, _ = checkpoints.neutral.read_arrays(path)
    count = {name: net.get_submodule(name).weight.numel() for name in names}
    for name in names:
        assert arrays[f"{name}.packed"].nbytes == -(-count[name] * w // 8)
    assert size == path.stat().st_size
    back, told = load_net(path)
    assert told["quantization"]["w_bits"] == dict.fromkeys(names, w)
    levels = 2**w - symmetric
    assert set(told["quantization"]["w_levels"].values()) == {levels}
    one, other = made.state_dict(), back.state_dict()
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value.float(), other[name].float()), name
    with torch.no_grad():
        assert torch.equal(made(images), back(images))


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
