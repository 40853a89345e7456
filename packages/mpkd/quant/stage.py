"""The quantization stage: from a trained student to a quantized one, with what it cost and lost.

``run_quantization`` is the only thing that the pipeline calls. It measures before and after,
searches where a method searches, and then quantizes the network a second time with uniform bits
that cost no more, in the same way: a search that loses against them says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpkd.quant.budget import (
    BitPlan,
    Budget,
    bops_budget,
    latency_budget,
    layer_options,
    size_budget,
)
from mpkd.quant.cost import LayerFacts, bit_operations, layer_facts, mean_bits, size_bytes
from mpkd.quant.finish import FINISHES, FinishOptions, Material, StateFactory, finish, silent
from mpkd.quant.latency import check_measurable, latency_table
from mpkd.quant.layers import FLOAT, bits_for, fold_batch_norms
from mpkd.quant.ptq import float_net
from mpkd.quant.qat import Batches, QatLoss
from mpkd.quant.search.choose import SEARCHES, Choice, SearchOptions, choose

PLAIN = ("ptq", "qat", "brecq")
METHODS = ("none", *PLAIN, *SEARCHES)
PINNED = 8  # bits of the first and the last layer
BINS = 0.1  # strength of SDQ's bin regulariser


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


@dataclass
class QuantizationResult:
    """A quantized network and what is known about it.

    Attributes:
        net: in evaluation mode; with method ``none`` the student itself.
        method, finish: how the bits were chosen, and how the network was made from them.
        w_bits, a_bits: by layer, 32 = left as it is.
        mean_bits: bits a weight.
        size_bytes, bops: of the stored network (batch norms folded); of one image.
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
    mean_bits: float
    size_bytes: int
    bops: int
    float_size_bytes: int
    float_bops: int
    accuracy_float: float
    accuracy: float
    budget: dict[str, Any] | None = None
    baselines: list[Baseline] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def uniform(self) -> Baseline | None:
        """The best of the baselines."""
        return max(self.baselines, key=lambda one: one.accuracy, default=None)

    def float_net(self) -> nn.Module:
        """A plain network with the weights on their grids, for export."""
        return float_net(self.net)

    def record(self) -> dict[str, Any]:
        """Everything but the network, as plain JSON."""
        skipped = {"net", "baselines"}
        return {
            **{key: value for key, value in vars(self).items() if key not in skipped},
            "baselines": [dict(vars(one)) for one in self.baselines],
        }


def run_quantization(
    student: nn.Module,
    config: Mapping[str, Any],
    *,
    calibration: Tensor,
    evaluate: Callable[[nn.Module], float],
    teacher: nn.Module | None = None,
    train_batches: Batches | None = None,
    steps_an_epoch: int | None = None,
    state: StateFactory | None = None,
    cache: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> QuantizationResult:
    """Quantize ``student`` as ``config`` says.

    Args:
        student: trained, plain; it is not changed.
        config: by dotted key: ``quantization.*``, ``distillation.{mode,loss,temperature,alpha}``,
            ``experiment.{seed,weight_decay}``. Beyond config.yaml it may have
            ``quantization.finish`` (``auto``, ``ptq``, ``brecq``, ``qat``), ``.brecq_steps``,
            ``.brecq_learning_rate``, ``.haq_episodes``, ``.sdq_epochs`` (0 = as ``epochs``),
            ``.mixquant_rule`` (``budget``, ``published``), ``.compare_uniform``, ``.symmetric``
            (of ``ptq``), ``.ranges`` (``mse``, ``minmax``) and ``.learned`` (scales, in ``qat``).
        calibration: normalised images float32 ``(N, 3, H, H)`` on the student's device.
        evaluate: a network's accuracy in ``[0, 1]`` on the validation split: searches choose by it.
        teacher: images to logits, in evaluation mode.
        train_batches: by epoch, ``(images, labels or None[, teacher logits])``; the same epoch
            gives the same batches. Needed by ``qat``, by ``sdq``, and where the finish is ``qat``.
        steps_an_epoch: batches in an epoch; None counts those of epoch 0.
        state: makes the place for a training's state from its name and parts, as
            ``lambda stage, parts: StageState(stage, parts, log)``. A killed run goes on exactly.
        cache: a JSON file of the accuracies that a search measured, for the same end.
        log: says a line.

    Raises:
        ValueError: an unknown name, a budget that cannot be kept, or something missing.
    """
    settings = _Settings(config)
    if calibration.dim() != 4 or calibration.shape[2] != calibration.shape[3]:
        raise ValueError(
            f"calibration images have shape {tuple(calibration.shape)}, expected (N, 3, H, H)"
        )
    student = student.eval()
    material = Material(
        calibration, train_batches, 0, teacher, state, silent if log is None else log
    )
    facts = layer_facts(student, calibration.shape[-1])
    accuracy_float = float(evaluate(student))
    how = settings.finish_of(trains=train_batches is not None)
    if train_batches is not None and (how == "qat" or settings.method == "sdq"):
        material.steps_an_epoch = (
            sum(1 for _ in train_batches(0)) if steps_an_epoch is None else steps_an_epoch
        )
    budget: Budget | None = None
    if settings.method == "none":
        plan = BitPlan(_all(facts, FLOAT), _all(facts, FLOAT))
        choice, net = Choice(plan, student), student
    elif settings.method in PLAIN:
        choice = Choice(settings.plain_plan(facts), student)
        net = finish(student, choice.plan, how, material, settings.finishing(), name=how)
    else:
        budget = settings.budget(student, facts, calibration)
        options = settings.searching(calibration.shape[-1], accuracy_float)
        choice = choose(
            settings.method, student, budget, material, options, evaluate=evaluate, cache=cache
        )
        net = finish(choice.net, choice.plan, how, material, settings.finishing(), name=how)
    accuracy = accuracy_float if net is student else float(evaluate(net))
    folded = fold_batch_norms(student)
    result = QuantizationResult(
        net=net,
        method=settings.method,
        finish="none" if settings.method == "none" else how,
        w_bits=choice.plan.w,
        a_bits=choice.plan.a,
        mean_bits=mean_bits(facts, choice.plan.w),
        size_bytes=size_bytes(folded, facts, choice.plan.w),
        bops=bit_operations(facts, choice.plan.w, choice.plan.a),
        float_size_bytes=size_bytes(folded, facts, {}),
        float_bops=bit_operations(facts, {}, {}),
        accuracy_float=accuracy_float,
        accuracy=accuracy,
        budget=None if budget is None else budget.record(choice.plan),
        notes=list(choice.notes),
        details=choice.details,
    )
    if budget is not None and settings.method != "uniform" and settings.compare:
        _compare(result, student, facts, budget, how, material, settings, evaluate)
    material.clear()
    return result


def _all(facts: Sequence[LayerFacts], bits: int) -> dict[str, int]:
    return {one.name: bits for one in facts}


def _compare(
    result: QuantizationResult,
    student: nn.Module,
    facts: list[LayerFacts],
    budget: Budget,
    how: str,
    material: Material,
    settings: _Settings,
    evaluate: Callable[[nn.Module], float],
) -> None:
    """Add the uniform baselines and say who wins."""
    for number, (name, plan, cost) in enumerate(uniform_plans(facts, budget)):
        extra = settings.sdq_epochs if settings.method == "sdq" else 0  # as long as the search
        net = finish(
            student, plan, how, material, settings.finishing(more_epochs=extra),
            name=f"uniform{number}",
        )  # fmt: skip
        result.baselines.append(Baseline(name, plan.w, plan.a, cost, float(evaluate(net))))
    best = result.uniform
    if best is None:
        result.notes.append("no uniform number of bits fits this budget: nothing to compare with")
        return
    points = 100 * (result.accuracy - best.accuracy)
    if points > 0:
        said = f"{result.method} is better than {best.name} by {points:.1f} points"
    elif points < 0:
        said = f"{best.name} are better than {result.method} here, by {-points:.1f} points"
    else:
        said = f"{result.method} and {best.name} reach the same accuracy"
    share = best.cost / max(result.budget["cost"], 1e-300)  # type: ignore[index]  # there is one
    result.notes.append(f"{said} (the uniform bits cost {share:.2f} times as much)")


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


class _Settings:
    """The configuration, read and checked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        def q(key: str, default: Any = None) -> Any:
            value = config.get(f"quantization.{key}", default)
            if value is None:
                raise ValueError(f"quantization.{key} is missing, expected a value")
            return value

        self.method: str = q("method")
        if self.method not in METHODS:
            raise ValueError(
                f"quantization.method is {self.method!r}: expected one of {', '.join(METHODS)}"
            )
        self.finish: str = q("finish", "auto")
        if self.finish not in ("auto", *FINISHES):
            raise ValueError(
                f"quantization.finish is {self.finish!r}: expected auto, {', '.join(FINISHES)}"
            )
        self.w_bits, self.a_bits = int(q("w_bits", 8)), int(q("a_bits", 8))
        for key, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits)):
            if bits != FLOAT and not 2 <= bits <= 16:
                raise ValueError(f"quantization.{key} is {bits}, expected 2 to 16, or 32 for none")
        self.candidates: list[int] = list(q("candidates", [2, 3, 4, 5, 6, 7, 8]))
        self.kind, self.limit = q("budget_kind", "size"), float(q("budget", 3.0))
        self.pin = PINNED if q("first_last_8bit", True) else None
        self.epochs, self.rate = int(q("epochs", 3)), float(q("learning_rate", 1e-4))
        self.sdq_epochs = int(q("sdq_epochs", 0)) or self.epochs
        self.brecq_steps = int(q("brecq_steps", 2000))
        self.brecq_rate = float(q("brecq_learning_rate", 0.0))
        self.haq_episodes = int(q("haq_episodes", 120))
        self.mixquant_rule: str = q("mixquant_rule", "budget")
        self.compare = bool(q("compare_uniform", True))
        self.symmetric, self.ranges = bool(q("symmetric", True)), q("ranges", "mse")
        self.learned = bool(q("learned", True))
        self.seed = int(config.get("experiment.seed", 0))
        self.weight_decay = float(config.get("experiment.weight_decay", 0.0))
        self.loss = QatLoss(
            config.get("distillation.mode", "teacher_only"),
            loss=config.get("distillation.loss", "kl"),
            temperature=float(config.get("distillation.temperature", 4.0)),
            alpha=float(config.get("distillation.alpha", 0.7)),
        )

    def finish_of(self, *, trains: bool) -> str:
        """The way to finish: the method's own, or the one that was asked for."""
        if self.method in PLAIN:
            if self.finish not in ("auto", self.method):
                raise ValueError(
                    f"quantization.finish is {self.finish!r} with method {self.method}: expected "
                    "auto, or a method that searches"
                )
            return self.method
        if self.finish != "auto":
            return self.finish
        return "qat" if self.method in ("haq", "sdq") and trains else "ptq"

    def plain_plan(self, facts: Sequence[LayerFacts]) -> BitPlan:
        """The same bits for all, but the first and the last."""
        names = [one.name for one in facts]

        def spread(bits: int) -> dict[str, int]:
            pin = None if bits == FLOAT else self.pin
            return bits_for(names, bits, first_last=pin)

        return BitPlan(spread(self.w_bits), spread(self.a_bits))

    def budget(self, student: nn.Module, facts: list[LayerFacts], calibration: Tensor) -> Budget:
        """Choices and limit; measures latencies where they are the cost."""
        w = layer_options(facts, self.candidates, first_last=self.pin)
        a: dict[str, Sequence[int]] = {n: (b,) for n, b in self.plain_plan(facts).a.items()}
        if self.kind == "size":
            return size_budget(facts, self.limit, w_options=w, a_options=a)
        if self.kind == "bops":
            if self.method == "haq" and self.a_bits != FLOAT:  # it chooses bits of inputs too
                a = layer_options(facts, self.candidates, first_last=self.pin)
            return bops_budget(facts, self.limit, w_options=w, a_options=a)
        if self.kind != "latency":
            raise ValueError(
                f"quantization.budget_kind is {self.kind!r}: expected size, bops, latency"
            )
        check_measurable(self.candidates, calibration.device)
        table = latency_table(student, calibration.shape[-1], self.candidates)
        return latency_budget(table, self.limit, w_options=w, a_options=a)

    def finishing(self, *, more_epochs: int = 0) -> FinishOptions:
        """How to finish, for the search and for its baseline alike."""
        return FinishOptions(
            epochs=self.epochs + more_epochs,
            learning_rate=self.rate,
            loss=self.loss,
            weight_decay=self.weight_decay,
            bins=BINS if self.method == "sdq" else 0.0,
            brecq_steps=self.brecq_steps,
            brecq_rate=self.brecq_rate,
            seed=self.seed,
            symmetric=self.symmetric,
            ranges=self.ranges,
            learned=self.learned,
        )

    def searching(self, image_size: int, float_accuracy: float) -> SearchOptions:
        """Settings of the search."""
        return SearchOptions(
            seed=self.seed,
            image_size=image_size,
            float_accuracy=float_accuracy,
            loss=self.loss,
            haq_episodes=self.haq_episodes,
            sdq_epochs=self.sdq_epochs,
            learning_rate=self.rate,
            weight_decay=self.weight_decay,
            mixquant_rule=self.mixquant_rule,
        )
