"""The stage: each method keeps its budget, is compared with uniform bits, survives a stop."""

from __future__ import annotations

import json

import pytest
import torch

from mpkd.quant.budget import size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.layers import QuantLayer, quant_layers
from mpkd.quant.search.choose import Scores
from mpkd.quant.stage import METHODS, run_quantization, uniform_plans
from mpkd.utils.config import CHOICES, load_config
from shared_core.for_torch.run_state import StageState
from shared_core.runs import StageLog

SMALL = {
    "experiment.weight_decay": 0.0, "distillation.temperature": 2.0, "quantization.a_bits": 32,
    "quantization.epochs": 1, "quantization.learning_rate": 2e-3, "quantization.haq_episodes": 12,
    "quantization.brecq_steps": 40, "quantization.candidates": [2, 3, 4, 8],
    "quantization.first_last_8bit": False,
}  # fmt: skip


def config(**changes):
    found = load_config() | SMALL
    return found | {f"quantization.{key}": value for key, value in changes.items()}


def run(digits, changes=None, *, trains=False, **more):
    settings = config(**(changes or {}))
    if trains:
        more |= {"teacher": digits.net, "train_batches": digits.batches,
                 "steps_an_epoch": digits.steps}  # fmt: skip
    return run_quantization(
        digits.net, settings, calibration=digits.calibration[:128], evaluate=digits.evaluate, **more
    )


def test_the_names_are_those_of_the_configuration():
    assert set(METHODS) == set(CHOICES["quantization.method"])


def test_none_leaves_the_student_alone(mpkd_digits):
    result = run(mpkd_digits, {"method": "none"})
    assert result.net is mpkd_digits.net and result.mean_bits == 32 and result.finish == "none"
    assert result.accuracy == result.accuracy_float == mpkd_digits.accuracy
    assert result.size_bytes == result.float_size_bytes and result.bops == result.float_bops


def test_sizes_and_costs_are_counted(mpkd_digits):
    result = run(mpkd_digits, {"method": "ptq", "w_bits": 4, "a_bits": 8, "first_last_8bit": True})
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
    plain = result.float_net()
    assert not quant_layers(plain)


@pytest.mark.slow
def test_sensitivity_beats_uniform_bits_at_three_on_average(mpkd_digits):
    result = run(mpkd_digits, {"method": "sensitivity", "candidates": [2, 3, 4, 5, 6, 7, 8]})
    assert result.budget["cost"] <= result.budget["limit"] and result.mean_bits <= 3
    assert [one.name for one in result.baselines] == ["uniform 3 bits"]
    assert result.uniform.cost == result.budget["limit"]  # all of it, no more
    assert len(set(result.w_bits.values())) > 1
    assert result.accuracy > result.uniform.accuracy
    assert any("sensitivity is better than uniform 3 bits" in note for note in result.notes)
    repeated = run(mpkd_digits, {"method": "sensitivity", "candidates": [2, 3, 4, 5, 6, 7, 8]})
    assert repeated.record() == result.record()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform", "sensitivity", "haq", "sdq", "mixquant"])
@pytest.mark.parametrize(("kind", "budget"), [("size", 3.3), ("bops", 0.4), ("latency", 4.0)])
def test_every_search_keeps_every_budget(mpkd_digits, method, kind, budget):
    changes = {"method": method, "budget_kind": kind, "budget": budget, "finish": "ptq",
               "a_bits": 8}  # fmt: skip
    if kind == "latency":
        changes["candidates"] = [8, 32]
    result = run(mpkd_digits, changes, trains=True)
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


def test_a_search_that_loses_says_so(mpkd_digits):
    """One episode of a random agent against the uniform bits."""
    accuracies = iter([0.9, 0.5, 0.6, 0.7])  # float, the episode, the result, the baseline
    result = run_quantization(
        mpkd_digits.net, config(method="haq", haq_episodes=1, finish="ptq"),
        calibration=mpkd_digits.calibration[:16], evaluate=lambda net: next(accuracies),
    )  # fmt: skip
    assert result.accuracy == 0.6 and result.uniform.accuracy == 0.7
    assert "uniform 3 bits are better than haq here, by 10.0 points" in result.notes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qat", "sdq"])
def test_a_stopped_stage_goes_on_exactly(mpkd_digits, tmp_path, method):
    def go(folder, stop_after=None):
        count = iter(range(10_000))

        def source(epoch):
            for batch in mpkd_digits.batches(epoch):
                if next(count) == stop_after:
                    raise KeyboardInterrupt
                yield batch

        log = StageLog(folder)
        return run_quantization(
            mpkd_digits.net, config(method=method, w_bits=2, epochs=2, compare_uniform=False),
            calibration=mpkd_digits.calibration[:64], evaluate=mpkd_digits.evaluate,
            teacher=mpkd_digits.net, train_batches=source, steps_an_epoch=4,
            state=lambda stage, parts: StageState(stage, parts, log),
        )  # fmt: skip

    whole = go(tmp_path / "whole")
    assert not list((tmp_path / "whole" / "state").iterdir())  # nothing is left behind
    stop = 6 if method == "qat" else 14  # in the last training of each
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", stop)
    assert list((tmp_path / "cut" / "state").iterdir())
    again = go(tmp_path / "cut")
    one, other = whole.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one) and whole.record() == again.record()


@pytest.mark.slow
def test_a_stopped_haq_replays_its_scores(mpkd_digits, tmp_path):
    asked = []

    def evaluate(net, *, limit=None):
        bits = tuple(m.w_bits for m in net.modules() if isinstance(m, QuantLayer))
        asked.append(bits)
        if limit is not None and len(asked) > limit:
            raise KeyboardInterrupt
        return sum(bits) / 100

    settings = config(method="haq", finish="ptq", compare_uniform=False)
    images, cache = mpkd_digits.calibration[:16], tmp_path / "scores.json"

    def go(path, limit=None):
        asked.clear()
        return run_quantization(
            mpkd_digits.net, settings, calibration=images, cache=path,
            evaluate=lambda net: evaluate(net, limit=limit),
        )  # fmt: skip

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
        ({"method": "magic"}, "quantization.method is 'magic'"),
        ({"method": "ptq", "w_bits": 17}, "w_bits is 17, expected 2 to 16"),
        ({"method": "ptq", "finish": "qat"}, "expected auto, or a method that searches"),
        ({"method": "haq", "finish": "best"}, "finish is 'best'"),
        ({"method": "qat"}, "no training batches"),
        ({"method": "sdq"}, "no training batches"),
        ({"method": "sensitivity", "budget": 1.5}, "the cheapest choice of bits costs"),
        ({"method": "sensitivity", "budget_kind": "bops", "budget": 2.0}, r"expected \(0, 1\]"),
        ({"method": "haq", "budget_kind": "latency"}, "no kernels for 2, 3, 4 bits"),
        ({"method": "haq", "budget_kind": "joules"}, "expected size, bops, latency"),
        ({"method": "mixquant", "mixquant_rule": "x"}, "expected one of budget, published"),
    ],
)
def test_what_cannot_be_done_is_refused(mpkd_digits, changes, message):
    with pytest.raises(ValueError, match=message):
        run(mpkd_digits, changes)


def test_calibration_images_must_be_square(mpkd_digits):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, H\)"):
        run_quantization(
            mpkd_digits.net, config(method="ptq"), calibration=torch.zeros(2, 3, 8, 16),
            evaluate=mpkd_digits.evaluate,
        )  # fmt: skip
