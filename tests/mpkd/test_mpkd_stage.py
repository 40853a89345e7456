"""The stage: each method keeps its budget, is compared with uniform bits, survives a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpkd import few_bits
from mpkd.deploy.layer_latency import latency_table
from mpkd.quant.budget import size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.finish import Material
from mpkd.quant.layers import QuantLayer, quant_layers, quantizable
from mpkd.quant.quantize import run_quantization, uniform_plans
from mpkd.quant.search.choose import Scores
from mpkd.quant.settings import METHODS, quant_settings
from mpkd.utils.config import CHOICES
from shared_core.datasets import ImageSet

SMALL = {
    "quantization.a_bits": 32, "quantization.haq_episodes": 12, "quantization.brecq_steps": 150,
    "quantization.candidates": [2, 3, 4, 8], "quantization.first_last_8bit": False,
}  # fmt: skip


def settings_of(digits, **changes):
    keys = {f"quantization.{key}": value for key, value in changes.items()}
    return quant_settings(digits.run.config | SMALL | keys)


def run(digits, material: Material | None = None, **changes):
    if material is None:
        material = Material(digits.calibration[:128], digits.evaluate)
    return run_quantization(digits.net, settings_of(digits, **changes), material)


def test_the_names_are_those_of_the_configuration():
    assert set(METHODS) == set(CHOICES["quantization.method"])


def test_none_leaves_the_student_alone(mpkd_digits):
    result = run(mpkd_digits, method="none")
    assert result.net is mpkd_digits.net and result.mean_bits == 32 and result.finish == "none"
    assert result.accuracy == result.accuracy_float == mpkd_digits.accuracy
    assert result.size_bytes == result.float_size_bytes and result.bops == result.float_bops


def test_sizes_and_costs_are_counted(mpkd_digits):
    result = run(mpkd_digits, method="ptq", w_bits=4, a_bits=8, first_last_8bit=True)
    weights = {"features.0.0": 432, "features.1.0": 2304, "features.2.0": 9216, "classifier": 640}
    assert result.w_bits == {n: 8 if n in ("features.0.0", "classifier") else 4 for n in weights}
    assert set(result.a_bits.values()) == {8}
    bits = sum(weights[n] * b for n, b in result.w_bits.items())
    assert result.mean_bits == pytest.approx(bits / sum(weights.values()))
    # One scale and one bias for each of the 16 + 16 + 64 + 10 output channels, 32 bits each.
    assert result.size_bytes == (bits + 32 * 2 * 106) // 8
    assert result.float_size_bytes == 4 * (sum(weights.values()) + 106)
    macs = {"features.0.0": 432 * 256, "features.1.0": 2304 * 64, "features.2.0": 9216 * 16,
            "classifier": 640}  # fmt: skip
    assert result.bops == sum(macs[n] * b * 8 for n, b in result.w_bits.items())
    assert result.budget is None and result.uniform is None
    json.dumps(result.record())


def test_two_bits_say_whether_they_are_three_or_four_levels(mpkd_digits):
    three = run(mpkd_digits, method="ptq", w_bits=2)
    four = run(mpkd_digits, method="ptq", w_bits=2, symmetric=False)
    assert set(three.w_levels.values()) == {3} and "ternary" in three.notes[0]
    assert set(four.w_levels.values()) == {4} and not four.notes
    for result, most in ((three, 3), (four, 4)):
        for layer in quant_layers(result.net).values():
            rows = layer.base.weight.reshape(len(layer.base.weight), -1)
            assert max(len(row.unique()) for row in rows) == most


def test_what_is_measured_is_what_is_shipped(mpkd_digits):
    """The accuracy of the record is that of the network that the stage hands on."""
    asked = []
    material = Material(
        mpkd_digits.calibration[:64], lambda net: asked.append(net) or mpkd_digits.evaluate(net)
    )
    result = run(mpkd_digits, material, method="ptq", w_bits=3)
    assert asked[-1] is result.net and result.accuracy == mpkd_digits.evaluate(result.net)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in result.net.modules())


def test_bits_by_sensitivity_use_the_whole_budget_and_repeat_themselves(mpkd_digits):
    """Which is better is a matter of the network, and of its processor: not judged here."""
    every = [2, 3, 4, 5, 6, 7, 8]
    result = run(mpkd_digits, method="sensitivity", candidates=every)
    assert result.budget["cost"] <= result.budget["limit"] and result.mean_bits <= 3
    assert [one.name for one in result.baselines] == ["uniform 3 bits"]
    assert result.uniform.cost == result.budget["limit"]  # all of it, no more
    table = result.details["sensitivities"]
    damage = sum(table[n][str(b)] for n, b in result.w_bits.items())
    assert damage <= sum(row["3"] for row in table.values())  # the least of all, so of uniform ones
    assert any("uniform 3 bits" in note for note in result.notes)
    assert run(mpkd_digits, method="sensitivity", candidates=every).record() == result.record()


@pytest.mark.parametrize("method", ["uniform", "sensitivity", "haq", "sdq", "mixquant"])
@pytest.mark.parametrize(("kind", "budget"), [("size", 3.3), ("bops", 0.4), ("latency", 4.0)])
def test_every_search_keeps_every_budget(mpkd_digits, tmp_path, method, kind, budget):
    changes = {"method": method, "budget_kind": kind, "budget": budget, "finish": "ptq",
               "a_bits": 8, "haq_episodes": 4}  # fmt: skip
    if kind == "latency":
        changes["candidates"] = [8, 32]
    digits = mpkd_digits.change(tmp_path)
    material = replace(
        digits.material(), calibration=digits.calibration[:64],
        latencies=lambda bits: latency_table(digits.net, 16, bits, repeats=2),
    )  # fmt: skip
    result = run(digits, material, **changes)
    assert result.budget["kind"] == kind
    assert result.budget["cost"] <= result.budget["limit"] * (1 + 1e-9)
    found = {n: (q.w_bits, q.a_bits) for n, q in quant_layers(result.net).items()}
    assert found == {n: (b, result.a_bits[n]) for n, b in result.w_bits.items()}
    for one in result.baselines:
        assert one.cost <= result.budget["limit"] * (1 + 1e-9)
    if method == "uniform":
        assert not result.baselines
    else:
        assert result.baselines and len(result.notes) >= 1
    json.dumps(result.record())


def test_bits_are_chosen_on_the_calibration_images_and_not_on_the_test_images(
    mpkd_digits, tmp_path
):
    """Other labels of the test images move nothing; other labels of the calibration images do."""
    found = {}
    for part in ("none", "test", "calibration"):
        digits = mpkd_digits.change(tmp_path / part, quantization__method="haq", **{
            key.replace(".", "__"): value for key, value in SMALL.items()
        }, quantization__finish="ptq")  # fmt: skip
        sets = dict(digits.run.data.sets)
        if part != "none":
            own = sets[part]
            labels = np.random.default_rng(0).permutation(own.labels)
            sets[part] = ImageSet(None, labels, own.keys, source=own.array)
        run_of = replace(digits.run, data=replace(digits.run.data, sets=sets))
        found[part] = few_bits.quantize(run_of, digits.net, None, "")[0].record()
    assert found["test"] == found["none"]
    assert found["calibration"]["details"]["rewards"] != found["none"]["details"]["rewards"]


def test_a_search_that_loses_says_so(mpkd_digits):
    """One episode of a random agent against the uniform bits."""
    accuracies = iter([0.9, 0.5, 0.6, 0.7])  # float, the episode, the result, the baseline
    material = Material(mpkd_digits.calibration[:16], lambda net: next(accuracies))
    result = run(mpkd_digits, material, method="haq", haq_episodes=1, finish="ptq")
    assert result.accuracy == 0.6 and result.uniform.accuracy == 0.7
    assert "uniform 3 bits are better than haq here, by 10.0 points" in result.notes[-1]


@pytest.mark.parametrize("steps", [150])
def test_few_steps_of_reconstruction_lift_two_bits(mpkd_digits, steps):
    """As the stage does it at a small scale: same grid, same start as rounding to the nearest."""
    changes = {"w_bits": 2, "first_last_8bit": True, "brecq_steps": steps, "symmetric": False}
    material = Material(mpkd_digits.calibration, mpkd_digits.evaluate)
    nearest, learned = (
        run(mpkd_digits, material, method=method, **changes).accuracy for method in ("ptq", "brecq")
    )
    assert learned >= nearest + 0.1 and learned >= mpkd_digits.accuracy - 0.06


class Stopped(Exception):
    """The process ends here."""


@pytest.mark.parametrize("method", ["qat", "sdq"])
def test_a_stopped_stage_goes_on_exactly(mpkd_digits, tmp_path, monkeypatch, method):
    """Two trainings of one stage: the second one's stop keeps what the first one wrote."""

    def go(folder: Path, stop_at: tuple[str, int] | None = None):
        digits = mpkd_digits.change(
            folder, distillation__cache_teacher_logits=False, quantization__epochs=2
        )
        states: list = []
        material = replace(digits.material(states), calibration=digits.calibration[:64])
        given = digits.run.csv.write

        def writing(row):
            given(row)
            if (row["stage"], row["epoch"]) == stop_at:
                raise Stopped  # after the epoch's line, before its state

        monkeypatch.setattr(digits.run.csv, "write", writing)
        return run(digits, material, method=method, w_bits=2, compare_uniform=False), states

    whole, states = go(tmp_path / "whole")
    assert len(states) == (1 if method == "qat" else 2)
    for state in states:
        state.remove()
    assert not list((tmp_path / "whole" / "state").glob("*.pth"))
    with pytest.raises(Stopped):
        go(tmp_path / "cut", ("quantize-qat", 2))
    again, _ = go(tmp_path / "cut")
    one, other = whole.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one) and whole.record() == again.record()
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_stopped_haq_replays_its_scores(mpkd_digits, tmp_path):
    asked = []

    def go(path, limit=None):
        asked.clear()

        def evaluate(net):
            bits = tuple(m.w_bits for m in net.modules() if isinstance(m, QuantLayer))
            asked.append(bits)
            if limit is not None and len(asked) > limit:
                raise KeyboardInterrupt
            return sum(bits) / 100

        material = Material(mpkd_digits.calibration[:16], evaluate, cache=path)
        return run(mpkd_digits, material, method="haq", finish="ptq", compare_uniform=False)

    cache = tmp_path / "scores.json"
    whole, all_of_them = go(None), len(asked)
    with pytest.raises(KeyboardInterrupt):
        go(cache, limit=5)
    again = go(cache)
    assert again.record() == whole.record() and len(asked) == all_of_them - 4
    other = torch.nn.Linear(2, 2)
    assert Scores(other, cache).known == {} and Scores(mpkd_digits.net, cache).known


def test_uniform_plans_with_and_without_fixed_layers(mpkd_digits):
    facts = layer_facts(mpkd_digits.net, 16)
    names = [one.name for one in facts]
    w = {n: (8,) if n in (names[0], names[-1]) else (2, 3, 4) for n in names}
    budget = size_budget(facts, 3.0, w_options=w, a_options=dict.fromkeys(names, (32,)))
    plans = uniform_plans(facts, budget)
    assert [name for name, _, _ in plans] == [
        "uniform 2 bits, first and last fixed", "uniform 3 bits everywhere",
    ]  # fmt: skip
    assert plans[1][2] == budget.limit and all(cost <= budget.limit for _, _, cost in plans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ptq", "w_bits": 17}, "w_bits is 17, expected 2 to 16"),
        ({"method": "ptq", "finish": "qat"}, "expected auto, or a method that searches"),
        ({"method": "qat"}, "no training images"),
        ({"method": "sdq"}, "no training images"),
        ({"method": "sensitivity", "budget": 1.5}, "the cheapest choice of bits costs"),
        ({"method": "sensitivity", "budget_kind": "bops", "budget": 2.0}, r"expected \(0, 1\]"),
        ({"method": "haq", "budget_kind": "latency"}, "nothing measures latencies"),
        ({"method": "haq", "budget_kind": "joules"}, "expected size, bops, latency"),
    ],
)
def test_what_cannot_be_done_is_refused(mpkd_digits, changes, message):
    with pytest.raises(ValueError, match=message):
        run(mpkd_digits, **changes)


def test_calibration_images_must_be_square(mpkd_digits):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, H\)"):
        run(mpkd_digits, Material(torch.zeros(2, 3, 8, 16), mpkd_digits.evaluate), method="ptq")


def test_every_key_of_the_configuration_is_read(mpkd_digits):
    """Of ``quantization.*`` nothing is left over that no part of the code looks at."""
    fields = set(settings_of(mpkd_digits, method="none").__dataclass_fields__)
    keys = {k.partition(".")[2] for k in mpkd_digits.run.config if k.startswith("quantization.")}
    assert keys - fields == {"calib_samples", "learning_rate"}  # of the run and of its trainer
    assert len(quantizable(mpkd_digits.net)) == 4
