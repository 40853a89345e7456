"""Quantization-aware training: no label in teacher-only mode, exact resume, and what it gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from mpkd.model.student import SimpleCNN
from mpkd.quant.brecq import reconstruct
from mpkd.quant.budget import BitPlan
from mpkd.quant.finish import FinishOptions, Material, finish
from mpkd.quant.layers import quant_layers, quantizable
from mpkd.quant.ptq import quantize_trained
from mpkd.quant.qat import QatLoss, QatRun, learned_scales, train, unpack
from mpkd.quant.search.bin_regulariser import bin_regulariser, bin_term
from shared_core.for_torch.run_state import StageState
from shared_core.runs import StageLog


def quantized(bits: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = SimpleCNN(4, widths=(6, 8)).eval()
    chosen = dict.fromkeys(quantizable(net), bits)
    return quantize_trained(
        net, chosen, chosen, calibration=torch.randn(16, 3, 8, 8), learned=True, fold=False
    )


def teacher() -> nn.Module:
    torch.manual_seed(5)
    return SimpleCNN(4, widths=(8, 8)).eval()


def batches(epoch: int, labels: str = "true"):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        images = torch.randn(8, 3, 8, 8, generator=generator)
        yield images, torch.randint(4, (8,), generator=generator) * (labels == "true")


def run_with(state=None, *, mode="teacher_only", epochs=2, labels="true", stop_after=None, **more):
    guide = teacher()
    run = QatRun(
        quantized(), QatLoss(mode, temperature=2.0), steps=epochs * 4, learning_rate=1e-3,
        teacher=guide, extra=lambda net: bin_regulariser(net, strength=0.1), **more,
    )  # fmt: skip
    saved = None if state is None else StageState("qat", {"run": run}, StageLog(state))

    def source(epoch):
        for index, batch in enumerate(batches(epoch, labels)):
            if stop_after is not None and epoch * 4 + index == stop_after:
                raise KeyboardInterrupt
            yield batch

    train(run, source, epochs=epochs, steps_an_epoch=4, saved=saved, save_every=1)
    return run


def weights(run: QatRun) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in run.net.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(one[k], other[k]) for k in one)


def test_labels_never_enter_teacher_only_training():
    found = weights(run_with())
    assert same(found, weights(run_with(labels="all zero")))
    assert not same(found, weights(run_with(mode="mixed")))
    assert not same(weights(run_with(mode="labels")), weights(run_with(mode="labels", labels="0")))


def test_the_loss_is_scipys():
    generator = np.random.default_rng(0)
    student, guide = generator.normal(size=(2, 5, 4))
    found = QatLoss("teacher_only", temperature=2.0)(
        torch.from_numpy(student), torch.from_numpy(guide), None
    )
    p = softmax(guide / 2, axis=1)
    wanted = 4 * (p * (log_softmax(guide / 2, axis=1) - log_softmax(student / 2, axis=1))).sum(1)
    assert float(found) == pytest.approx(wanted.mean(), rel=1e-5)


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("mode", ["teacher_only", "apprentice_a"])
def test_a_stopped_run_goes_on_exactly(tmp_path, stop, mode):
    whole = run_with(tmp_path / "whole", mode=mode)
    with pytest.raises(KeyboardInterrupt):
        run_with(tmp_path / "cut", mode=mode, stop_after=stop)
    again = run_with(tmp_path / "cut", mode=mode)
    assert again.done == whole.done == 8
    assert same(weights(whole), weights(again))
    if mode == "apprentice_a":
        assert same(whole.teacher.state_dict(), again.teacher.state_dict())
        assert not same(whole.teacher.state_dict(), teacher().state_dict())


def test_replayed_teacher_outputs_train_the_same():
    guide = teacher()
    live = run_with()
    replay = QatRun(
        quantized(), QatLoss(temperature=2.0), steps=8, learning_rate=1e-3,
        extra=lambda net: bin_regulariser(net, strength=0.1),
    )  # fmt: skip

    def kept(epoch):
        for images, _ in batches(epoch):
            yield images, None, guide(images).detach()

    train(replay, kept, epochs=2, steps_an_epoch=4)
    assert same(weights(live), weights(replay))


def test_weights_and_scales_learn_and_the_rate_falls_to_zero():
    net = quantized()
    before = [p.detach().clone() for p in learned_scales(net)]
    run = QatRun(net, QatLoss("labels"), steps=4, learning_rate=1e-2)
    rates = []
    for images, labels in batches(0):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step(images, labels)
    np.testing.assert_allclose(rates, 0.005 * (1 + np.cos(np.pi * np.arange(4) / 4)))
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0)
    moved = [not torch.equal(a, b) for a, b in zip(before, learned_scales(net), strict=True)]
    assert any(moved) and len(before) >= 6


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="expected one of teacher_only"):
        QatLoss("hard")
    run = QatRun(quantized(), QatLoss(), steps=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match="no teacher"):
        run.step(torch.randn(2, 3, 8, 8))
    run = QatRun(quantized(), QatLoss("labels"), steps=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match="no labels"):
        run.step(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="0 training steps"):
        QatRun(quantized(), QatLoss(), steps=0, learning_rate=1e-3)
    with pytest.raises(ValueError, match="epoch 0 had 4 batches, expected 5"):
        train(
            QatRun(quantized(), QatLoss("labels"), steps=5, learning_rate=1e-3),
            batches, epochs=1, steps_an_epoch=5,
        )  # fmt: skip
    assert unpack(torch.zeros(1))[1:] == (None, None) and unpack((1, 2)) == (1, 2, None)


def test_the_bin_regulariser_is_the_formula_and_gathers_weights():
    layer = quant_layers(quantized(3))["features.1.0"]
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
    with torch.no_grad():
        layer.base.weight.copy_(layer.quantized_weight())
    assert float(bin_term(layer).detach()) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="no quantized layer"):
        bin_regulariser(teacher())


@pytest.mark.slow
def test_training_on_keeps_eight_bits_and_saves_two(mpkd_digits):
    names = quantizable(mpkd_digits.net)
    found = {}
    for bits, inputs in ((8, 8), (2, 32)):
        chosen = {n: bits if n not in (names[0], names[-1]) else 8 for n in names}
        a = dict.fromkeys(names, inputs)
        images = mpkd_digits.calibration
        after = quantize_trained(mpkd_digits.net, chosen, a, calibration=images)
        net = quantize_trained(
            mpkd_digits.net, chosen, a, calibration=images, learned=True, fold=False
        )
        run = QatRun(
            net, QatLoss(temperature=2.0), steps=mpkd_digits.steps, learning_rate=2e-3,
            teacher=mpkd_digits.net,
        )  # fmt: skip
        train(run, mpkd_digits.batches, epochs=1, steps_an_epoch=mpkd_digits.steps)
        found[bits] = mpkd_digits.evaluate(after), mpkd_digits.evaluate(run.net)
    assert found[8][1] >= found[8][0] - 0.02
    assert found[2][1] >= found[2][0] + 0.1 and found[2][1] >= mpkd_digits.accuracy - 0.05


@pytest.mark.slow
def test_reconstruction_lifts_two_bits_by_forty_points(mpkd_digits):
    names = quantizable(mpkd_digits.net)
    bits = {n: 2 if n != names[0] else 8 for n in names}
    net = quantize_trained(mpkd_digits.net, bits, calibration=None)
    nearest = mpkd_digits.evaluate(net)
    reconstruct(
        net, mpkd_digits.calibration.split(64), steps=300, learning_rate=0.066, strength=0.1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert mpkd_digits.evaluate(net) >= nearest + 0.4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [150, 300])
def test_few_steps_of_reconstruction_still_lift_two_bits(mpkd_digits, steps):
    """As the stage does it at a small scale: same grid, same start as rounding to the nearest."""
    names = quantizable(mpkd_digits.net)
    bits = {n: 2 if n not in (names[0], names[-1]) else 8 for n in names}
    plan, material = BitPlan(bits, dict.fromkeys(names, 32)), Material(mpkd_digits.calibration)
    options = FinishOptions(
        epochs=1, learning_rate=1e-3, loss=QatLoss(), brecq_steps=steps, symmetric=False
    )
    nearest, learned = (
        mpkd_digits.evaluate(finish(mpkd_digits.net, plan, how, material, options, name=how))
        for how in ("ptq", "brecq")
    )
    assert learned >= nearest + 0.1 and learned >= mpkd_digits.accuracy - 0.1


def test_ranges_are_learned_or_stay(mpkd_digits):
    names = quantizable(mpkd_digits.net)
    plan = BitPlan(dict.fromkeys(names, 4), dict.fromkeys(names, 4))
    material = Material(mpkd_digits.calibration, mpkd_digits.batches, 2)
    found = {}
    for learned in (True, False):
        options = FinishOptions(
            epochs=1, learning_rate=1e-2, loss=QatLoss("labels"), ranges="minmax", learned=learned
        )
        net = finish(mpkd_digits.net, plan, "qat", material, options, name="qat")
        found[learned] = {n: p.detach() for n, p in net.named_parameters()}
    start = quantize_trained(
        mpkd_digits.net, plan.w, plan.a, calibration=mpkd_digits.calibration, method="minmax",
        fold=False,
    )  # fmt: skip
    for name, value in start.named_parameters():
        ranges = "_quantizer." in name
        assert torch.equal(found[False][name], value) == ranges, name  # weights learn all the same
        if name.endswith("_quantizer.scale"):
            assert not torch.equal(found[True][name], value), name


def test_reconstruction_is_not_misled_by_an_activation_in_place():
    """The unit's own output is the target, not what a ReLU made of it afterwards."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)
    ).eval()  # fmt: skip
    quantized_net = quantize_trained(net, {"0": 16}, calibration=None)
    found = reconstruct(quantized_net, [torch.randn(8, 3, 8, 8)], steps=1)
    assert found[0].before < 1e-6
