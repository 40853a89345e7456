"""From a trained student to a quantized one, with what it cost and lost.

``run_quantization`` is the only thing that the pipeline calls. It measures before and after,
searches where a method searches, and then quantizes the network a second time with uniform bits
that cost no more, in the same way: a search that loses against them says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mpkd.quant.budget import (
    BitPlan,
    Budget,
    bops_budget,
    latency_budget,
    layer_options,
    size_budget,
)
from mpkd.quant.cost import LayerFacts, bit_operations, layer_facts, mean_bits, size_bytes
from mpkd.quant.finish import Material, finish
from mpkd.quant.layers import FLOAT, fold_batch_norms, weight_levels
from mpkd.quant.search.choose import Choice, choose
from mpkd.quant.settings import PLAIN, QuantSettings
from mpkd.quant.shipped import shipped


@dataclass(frozen=True)
class Baseline:
    """Uniform bits that cost no more than the budget, finished in the same way.

    Attributes:
        name: in words.
        w_bits, a_bits: by layer.
        cost: in the unit of the budget.
        accuracy: fraction, of ``evaluate``.
    """

    name: str
    w_bits: dict[str, int]
    a_bits: dict[str, int]
    cost: float
    accuracy: float


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized network and what is known about it.

    Attributes:
        net: as it is shipped (norms folded, weights on their grids), in evaluation mode; with
            method ``none`` the student itself.
        method, finish: how the bits were chosen, and how the network was made from them.
        w_bits, a_bits: by layer, 32 = left as it is.
        w_levels: values that a weight may have, by layer: 3 or 4 at 2 bits.
        mean_bits: bits a weight.
        size_bytes, bops: of the stored network, counted; of one image.
        float_size_bytes, float_bops: the same of the student without quantization.
        accuracy_float, accuracy: fractions, of ``evaluate``.
        budget: kind, limit, cost, unit; None without a budget.
        baselines: uniform bits at no more than the same cost.
        notes: sentences for the report.
        details: plain values of the search.
    """

    net: nn.Module
    method: str
    finish: str
    w_bits: dict[str, int]
    a_bits: dict[str, int]
    w_levels: dict[str, int]
    mean_bits: float
    size_bytes: int
    bops: int
    float_size_bytes: int
    float_bops: int
    accuracy_float: float
    accuracy: float
    budget: dict[str, Any] | None = None
    baselines: tuple[Baseline, ...] = ()
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def uniform(self) -> Baseline | None:
        """The best of the baselines."""
        return max(self.baselines, key=lambda one: one.accuracy, default=None)

    def record(self) -> dict[str, Any]:
        """Everything but the network, as plain JSON."""
        return {
            **{key: value for key, value in vars(self).items() if key != "net"},
            "notes": list(self.notes),
            "baselines": [dict(vars(one)) for one in self.baselines],
        }


def run_quantization(
    student: nn.Module, settings: QuantSettings, material: Material
) -> QuantizationResult:
    """Quantize ``student`` as ``settings`` say.

    Args:
        student: trained, plain; it is not changed.

    Raises:
        ValueError: a budget that cannot be kept, or something missing.
    """
    shape = material.calibration.shape
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"calibration images have shape {tuple(shape)}, expected (N, 3, H, H)")
    student = student.eval()
    facts = layer_facts(student, shape[-1])
    accuracy_float = float(material.evaluate(student))
    if settings.method == "none":
        plain = BitPlan(_all(facts, FLOAT), _all(facts, FLOAT))
        return _result(student, settings, student, facts, Choice(plain, student),
                       accuracy_float, accuracy_float)  # fmt: skip
    how, budget = settings.how, None
    if settings.method in PLAIN:
        choice = Choice(settings.plain_plan(facts), student)
    else:
        budget = make_budget(settings, facts, material)
        choice = choose(student, budget, material, settings, float_accuracy=accuracy_float)
    net = shipped(finish(choice.net, choice.plan, how, material, settings, name=how))
    accuracy = float(material.evaluate(net))
    result = _result(student, settings, net, facts, choice, accuracy_float, accuracy)
    if budget is None:
        return result
    result = replace(result, budget=budget.record(choice.plan))
    if settings.method == "uniform" or not settings.compare_uniform:
        return result
    return _compared(result, student, facts, budget, material, settings)


def _all(facts: Sequence[LayerFacts], bits: int) -> dict[str, int]:
    return {one.name: bits for one in facts}


def _result(
    student: nn.Module,
    settings: QuantSettings,
    net: nn.Module,
    facts: list[LayerFacts],
    choice: Choice,
    accuracy_float: float,
    accuracy: float,
) -> QuantizationResult:
    """What is known without any comparison."""
    folded, plan = fold_batch_norms(student), choice.plan
    levels = weight_levels(net)
    notes = list(choice.notes)
    if 3 in levels.values():
        notes.append("2 bits a weight are three levels here (ternary): the grid is symmetric")
    return QuantizationResult(
        net=net,
        method=settings.method,
        finish=settings.how,
        w_bits=plan.w,
        a_bits=plan.a,
        w_levels=levels,
        mean_bits=mean_bits(facts, plan.w),
        size_bytes=size_bytes(folded, facts, plan.w),
        bops=bit_operations(facts, plan.w, plan.a),
        float_size_bytes=size_bytes(folded, facts, {}),
        float_bops=bit_operations(facts, {}, {}),
        accuracy_float=accuracy_float,
        accuracy=accuracy,
        notes=tuple(notes),
        details=choice.details,
    )


def _compared(
    result: QuantizationResult,
    student: nn.Module,
    facts: list[LayerFacts],
    budget: Budget,
    material: Material,
    settings: QuantSettings,
) -> QuantizationResult:
    """``result`` with the uniform baselines and a note who wins."""
    baselines = []
    for number, (name, plan, cost) in enumerate(uniform_plans(facts, budget)):
        net = finish(
            student, plan, settings.how, material, settings, name=f"uniform{number}",
            more_epochs=settings.search_epochs,  # as long as the search
        )  # fmt: skip
        accuracy = float(material.evaluate(shipped(net)))
        baselines.append(Baseline(name, plan.w, plan.a, cost, accuracy))
    result = replace(result, baselines=tuple(baselines))
    return replace(result, notes=(*result.notes, _who_wins(result)))


def _who_wins(result: QuantizationResult) -> str:
    best = result.uniform
    if best is None or result.budget is None:
        return "no uniform number of bits fits this budget: nothing to compare with"
    points = 100 * (result.accuracy - best.accuracy)
    if points > 0:
        said = f"{result.method} is better than {best.name} by {points:.1f} points"
    elif points < 0:
        said = f"{best.name} are better than {result.method} here, by {-points:.1f} points"
    else:
        said = f"{result.method} and {best.name} reach the same accuracy"
    share = best.cost / max(result.budget["cost"], 1e-300)
    return f"{said} (the uniform bits cost {share:.2f} times as much)"


def uniform_plans(facts: Sequence[LayerFacts], budget: Budget) -> list[tuple[str, BitPlan, float]]:
    """Uniform bits within the budget: with the fixed layers fixed, and the same bits everywhere.

    Returns:
        Name, plan and cost; the second only where it differs (and not for a latency, which was
        measured for the choices alone).
    """
    found = []
    pinned = budget.best_uniform()
    if pinned is not None:
        fixed = any(len(row) == 1 for row in budget.w_options.values())
        rest = ", first and last fixed" if fixed else ""
        found.append((f"uniform {pinned[0]} bits{rest}", pinned[1], budget.cost(pinned[1])))
    if budget.kind == "latency":
        return found
    a = {name: row[-1] for name, row in budget.a_options.items()}
    choices = {bits for row in budget.w_options.values() if len(row) > 1 for bits in row}
    for bits in sorted(choices, reverse=True):
        w = _all(facts, bits)
        if budget.kind == "size":
            cost = float(sum(one.weights * bits for one in facts))
        else:
            a = {n: bits if len(row) > 1 else row[-1] for n, row in budget.a_options.items()}
            cost = float(bit_operations(list(facts), w, a))
        if cost <= budget.limit * (1 + 1e-9):
            plan = BitPlan(w, dict(a))
            if all(plan.w != other.w or plan.a != other.a for _, other, _ in found):
                found.append((f"uniform {bits} bits everywhere", plan, cost))
            break
    return found


def make_budget(settings: QuantSettings, facts: list[LayerFacts], material: Material) -> Budget:
    """Choices and limit; measures latencies where they are the cost.

    Raises:
        ValueError: an unknown kind, or nothing that measures.
    """
    w = layer_options(facts, settings.candidates, first_last=settings.pin)
    a: dict[str, Sequence[int]] = {n: (b,) for n, b in settings.plain_plan(facts).a.items()}
    if settings.budget_kind == "size":
        return size_budget(facts, settings.budget, w_options=w, a_options=a)
    if settings.budget_kind == "bops":
        if settings.method == "haq" and settings.a_bits != FLOAT:  # it chooses those of inputs too
            a = dict(layer_options(facts, settings.candidates, first_last=settings.pin))
        return bops_budget(facts, settings.budget, w_options=w, a_options=a)
    if settings.budget_kind != "latency":
        raise ValueError(
            f"quantization.budget_kind is {settings.budget_kind!r}: expected size, bops, latency"
        )
    if material.latencies is None:
        raise ValueError("nothing measures latencies here, expected budget_kind size or bops")
    table = material.latencies(settings.candidates)
    return latency_budget(table, settings.budget, w_options=w, a_options=a)
