"""Training with few bits in the common loop: what it gains, what reaches it, what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.model.student import SimpleCNN
from mpkd.quant.budget import BitPlan
from mpkd.quant.companion import BinPull, bin_term
from mpkd.quant.finish import finish
from mpkd.quant.layers import quant_layers, quantizable, quantize_trained
from mpkd.quant.settings import quant_settings
from mpkd.quant.shipped import shipped
from mpkd.trainer.metrics_logger import read_metrics_csv
from mpkd.trainer.settings import parameter_groups


def plan_of(digits, w: int, a: int, *, ends: int | None = None) -> BitPlan:
    names = quantizable(digits.net)
    chosen = {n: ends if ends and n in (names[0], names[-1]) else w for n in names}
    return BitPlan(chosen, dict.fromkeys(names, a))


def trained(digits, plan: BitPlan, *, name: str = "qat", teaches: bool = True) -> nn.Module:
    settings = quant_settings(digits.run.config | {"quantization.method": "qat"})
    return finish(digits.net, plan, "qat", digits.material(teaches=teaches), settings, name=name)


def test_training_on_keeps_eight_bits_and_saves_two(mpkd_digits, tmp_path):
    """A wrong gradient of the outer half steps leaves two bits far behind."""
    for (w, a, ends), least in (((8, 8, None), 0.97), ((2, 2, None), 0.86)):
        plan = plan_of(mpkd_digits, w, a, ends=ends)
        digits = mpkd_digits.change(tmp_path / f"{w}", quantization__epochs=1 if w == 8 else 4)
        before = quantize_trained(digits.net, plan.w, plan.a, calibration=digits.calibration)
        after = digits.evaluate(shipped(trained(digits, plan)))
        assert after >= least, (w, after)
        if w == 2:
            assert after >= digits.evaluate(before) + 0.2


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"mixed_precision.enabled": True, "mixed_precision.dtype": "fp16"}, "loss_scale"),
        ({"training.clip": 0.5}, "grad_norm"),
        ({"training.ema": 0.9}, None),
        ({"training.lr_warmup_steps": 300, "experiment.epochs": 30}, None),
        ({"training.gradient_accumulation_steps": 4}, None),
    ],
)
def test_what_the_configuration_asks_of_training_reaches_the_bits(
    mpkd_digits, tmp_path, changes, column
):
    """Precision, clipping, averaged weights, warm-up, accumulation: each changes the result."""
    plan, found = plan_of(mpkd_digits, 3, 8), []
    for name, more in (("plain", {}), ("changed", changes)):
        more = {key.replace(".", "__"): value for key, value in more.items()}
        digits = mpkd_digits.change(tmp_path / name, dataset__max_images=128, **more)
        found.append(trained(digits, plan).state_dict())
        rows = read_metrics_csv(digits.run.csv.path)
        assert [row["stage"] for row in rows] == ["quantize-qat"]
        if column is not None:
            assert (rows[0][column] is not None) == bool(more)
    assert any(not torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_learned_scales_move_by_a_share_of_their_size_and_offsets_by_one_of_the_grid():
    """One rule for all of them: Adam's step is about the rate, which is more than many a scale."""
    torch.manual_seed(0)
    net = SimpleCNN(4, widths=(6, 8)).eval()
    eight = dict.fromkeys(quantizable(net), 8)
    quantized = quantize_trained(
        net, eight, eight, calibration=torch.randn(16, 3, 8, 8), learned=True, fold=False
    )
    groups = parameter_groups(quantized, weight_decay=0.1)
    units = {id(g["params"][0]): g["relative"] for g in groups if "relative" in g}
    named = {name: p for name, p in quantized.named_parameters() if "_quantizer." in name}
    learned = {name: p for name, p in named.items() if p.requires_grad}
    assert {name for name in named if name not in learned} == {  # inputs after a ReLU have none
        "features.1.0.input_quantizer.zero_point", "classifier.input_quantizer.zero_point",
    }  # fmt: skip
    for name, parameter in learned.items():
        wanted = 255.0 if name.endswith("zero_point") else float(parameter.detach().abs().mean())
        assert units[id(parameter)] == pytest.approx(wanted), name
    held = [id(p) for g in groups for p in g["params"]]
    assert (
        len(held) == len(set(held)) == len([p for p in quantized.parameters() if p.requires_grad])
    )
    assert all(g["weight_decay"] == 0 for g in groups if "relative" in g)


def test_ranges_are_learned_or_stay(mpkd_digits, tmp_path):
    plan, found = plan_of(mpkd_digits, 4, 4), {}
    for learned in (True, False):
        digits = mpkd_digits.change(
            tmp_path / str(learned), quantization__ranges="minmax", quantization__learned=learned
        )
        found[learned] = {n: p.detach() for n, p in trained(digits, plan).named_parameters()}
    start = quantize_trained(
        mpkd_digits.net, plan.w, plan.a, calibration=mpkd_digits.calibration, method="minmax",
        fold=False,
    )  # fmt: skip
    for name, value in start.named_parameters():
        ranges = "_quantizer." in name
        assert torch.equal(found[False][name], value) == ranges, name  # weights learn all the same
        if name.endswith("_quantizer.scale"):
            assert not torch.equal(found[True][name], value), name


def quantized(bits: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = SimpleCNN(4, widths=(6, 8)).eval()
    chosen = dict.fromkeys(quantizable(net), bits)
    return quantize_trained(net, chosen, None, calibration=None, learned=True, fold=False)


def test_the_bin_regulariser_is_the_formula_and_gathers_weights():
    net = quantized()
    layer = quant_layers(net)["features.1.0"]
    weight, scale = (
        layer.base.weight.detach().numpy(),
        layer.weight_quantizer.scale.detach().numpy(),
    )
    places = (weight / scale[:, None, None, None]).astype(np.float64)
    integers = np.clip(np.round(places), -3, 3)
    terms = [
        (places[integers == k].mean() - k) ** 2 + places[integers == k].var()
        for k in np.unique(integers)
    ]
    assert float(bin_term(layer).detach()) == pytest.approx(np.mean(terms), rel=1e-4)
    every = [float(bin_term(one).detach()) for one in quant_layers(net).values()]
    assert float(BinPull(0.2).term(net).detach()) == pytest.approx(0.2 * np.mean(every), rel=1e-5)
    with torch.no_grad():
        layer.base.weight.copy_(layer.quantized_weight())
    assert float(bin_term(layer).detach()) == pytest.approx(0, abs=1e-8)
    assert BinPull(0.0).term(net) is None and BinPull().term(SimpleCNN(4)) is None


def test_the_bin_regulariser_reaches_sdqs_training(mpkd_digits, tmp_path):
    plan, gathered = plan_of(mpkd_digits, 3, 32), []
    for strength in (0.0, 10.0):
        digits = mpkd_digits.change(tmp_path / f"{strength}", quantization__bin_strength=strength)
        settings = quant_settings(digits.run.config | {"quantization.method": "sdq"})
        net = finish(digits.net, plan, "qat", digits.material(), settings, name="sdq-end")
        gathered.append(sum(float(bin_term(one).detach()) for one in quant_layers(net).values()))
    assert gathered[1] < 0.7 * gathered[0]
