"""One door to all searches: a method's name, a budget, and out come the bits of every layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mpkd.quant.budget import BitPlan, Budget
from mpkd.quant.finish import Material
from mpkd.quant.layers import fold_batch_norms
from mpkd.quant.ptq import quantize_trained
from mpkd.quant.qat import QatLoss, train
from mpkd.quant.search.haq import Environment, Episode, search_haq
from mpkd.quant.search.mixquant import (
    REFERENCE,
    published_within,
    round_off_errors,
    within_budget,
)
from mpkd.quant.search.sdq import SdqRun
from mpkd.quant.search.sensitivity import choose_bits, sensitivities
from shared_core.checkpoints import atomic_write
from shared_core.for_torch.checkpoints import weights_sha256

SEARCHES = ("uniform", "sensitivity", "haq", "sdq", "mixquant")
MIXQUANT_RULES = ("budget", "published")
SHOWN = 20  # a search says a line every so many episodes


@dataclass
class Choice:
    """What a search found.

    Attributes:
        plan: bits within the budget.
        net: the network to finish: the student, or the weights that the search trained on.
        notes: sentences for the report.
        details: plain values for the record.
    """

    plan: BitPlan
    net: nn.Module
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchOptions:
    """Settings of the searches; each reads its own.

    Attributes:
        seed: of agents and samples.
        image_size: side in pixels.
        float_accuracy: of the student, in [0, 1].
        haq_episodes: tries of the agent; a tenth of them, at most 20, warm up.
        sdq_epochs, learning_rate, weight_decay, loss: of SDQ's first phase.
        mixquant_rule: ``budget`` or ``published``.
    """

    seed: int
    image_size: int
    float_accuracy: float
    loss: QatLoss
    haq_episodes: int = 120
    sdq_epochs: int = 3
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    mixquant_rule: str = "budget"


class Scores:
    """Accuracies already measured, by bits; kept in a file so that a killed search replays them.

    Args:
        net: whose accuracies they are; those of other weights are dropped.
        path: a JSON file; None keeps nothing.
    """

    def __init__(self, net: nn.Module, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.of = weights_sha256(net.state_dict())
        self.known: dict[str, float] = {}
        if self.path is not None and self.path.is_file():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content.get("of") == self.of:
                self.known = content["scores"]

    def ask(self, plan: BitPlan, measure: Callable[[BitPlan], float]) -> float:
        """The accuracy of ``plan``, measured once."""
        key = plan.key()
        if key not in self.known:
            self.known[key] = float(measure(plan))
            if self.path is not None:
                text = json.dumps({"of": self.of, "scores": self.known})
                atomic_write(self.path, lambda path: path.write_text(text, encoding="utf-8"))
        return self.known[key]


def choose(
    method: str,
    student: nn.Module,
    budget: Budget,
    material: Material,
    options: SearchOptions,
    *,
    evaluate: Callable[[nn.Module], float],
    cache: str | Path | None = None,
) -> Choice:
    """The bits that ``method`` chooses under ``budget``.

    Args:
        method: one of ``SEARCHES``.
        evaluate: accuracy in ``[0, 1]`` on images that may be used to choose; HAQ's reward.
        cache: a JSON file of HAQ's scores.

    Raises:
        ValueError: an unknown method, or what the method needs is missing.
    """
    ways: Mapping[str, Callable[[], Choice]] = {
        "uniform": lambda: _uniform(student, budget),
        "sensitivity": lambda: _sensitivity(student, budget, material),
        "haq": lambda: _haq(student, budget, material, options, evaluate, cache),
        "sdq": lambda: _sdq(student, budget, material, options),
        "mixquant": lambda: _mixquant(student, budget, options),
    }
    if method not in ways:
        raise ValueError(f"search {method!r}: expected one of {', '.join(SEARCHES)}")
    choice = ways[method]()
    budget.check(choice.plan)
    return choice


def _uniform(student: nn.Module, budget: Budget) -> Choice:
    found = budget.best_uniform()
    if found is None:
        return Choice(budget.check(budget.cheapest()), student)
    return Choice(found[1], student, details={"uniform_bits": found[0]})


def _sensitivity(student: nn.Module, budget: Budget, material: Material) -> Choice:
    a = budget.largest().a
    free = [name for name, row in budget.w_options.items() if len(row) > 1]
    candidates = sorted({bits for name in free for bits in budget.w_options[name]})
    damage = {name: {row[0]: 0.0} for name, row in budget.w_options.items() if len(row) == 1}
    if free:
        folded = fold_batch_norms(student)
        damage |= sensitivities(folded, material.calibration, candidates, names=free)
    damage = {name: damage[name] for name in budget.names}
    cost = {
        name: {bits: budget.table[name][bits, a[name]] for bits in row}
        for name, row in budget.w_options.items()
    }
    plan = BitPlan(choose_bits(damage, cost, budget.limit), a)
    table = {name: {str(bits): kl for bits, kl in row.items()} for name, row in damage.items()}
    return Choice(plan, student, details={"sensitivities": table})


def _mixquant(student: nn.Module, budget: Budget, options: SearchOptions) -> Choice:
    if options.mixquant_rule not in MIXQUANT_RULES:
        raise ValueError(
            f"MixQuant's rule is {options.mixquant_rule!r}: expected one of "
            f"{', '.join(MIXQUANT_RULES)}"
        )
    folded = fold_batch_norms(student)
    bits = sorted({b for row in budget.w_options.values() for b in row} | {REFERENCE})
    errors = round_off_errors(folded, bits)
    if options.mixquant_rule == "budget":
        return Choice(within_budget(folded, errors, budget), student)
    plan = published_within(errors, budget)
    free = {plan.w[name] for name, row in budget.w_options.items() if len(row) > 1}
    notes = []
    if len(free) == 1:
        notes.append(
            f"MixQuant's published rule gave {free.pop()} bits to every layer that has a choice: "
            "with min-max ranges by channel the error falls four times a bit in all of them"
        )
    return Choice(plan, student, notes)


def _haq(
    student: nn.Module,
    budget: Budget,
    material: Material,
    options: SearchOptions,
    evaluate: Callable[[nn.Module], float],
    cache: str | Path | None,
) -> Choice:
    scores = Scores(student, cache)

    def measure(plan: BitPlan) -> float:
        trial = quantize_trained(student, plan.w, plan.a, calibration=material.calibration)
        return evaluate(trial)

    def report(number: int, episode: Episode) -> None:
        if (number + 1) % SHOWN == 0:
            material.log(
                f"haq: episode {number + 1}/{options.haq_episodes}: reward {episode.reward:.3f}"
            )

    found = search_haq(
        Environment(student, options.image_size, budget),
        lambda plan: scores.ask(plan, measure),
        float_accuracy=options.float_accuracy,
        episodes=options.haq_episodes,
        warm_up=min(20, max(1, options.haq_episodes // 10)),
        seed=options.seed,
        report=report,
    )
    rewards = [episode.reward for episode in found.episodes]
    details = {"rewards": rewards, "plans_scored": len(scores.known)}
    return Choice(found.best.plan, student, details=details)


def _sdq(student: nn.Module, budget: Budget, material: Material, options: SearchOptions) -> Choice:
    if material.batches is None:
        raise ValueError("no training batches, expected some: method sdq trains")
    run = SdqRun(
        student, budget, options.loss, steps=options.sdq_epochs * material.steps_an_epoch,
        learning_rate=options.learning_rate, weight_decay=options.weight_decay,
        seed=options.seed, teacher=material.teacher,
    )  # fmt: skip

    def after(epoch: int, means: dict[str, float]) -> None:
        bits = " ".join(str(b) for b in run.bits().values())
        material.log(f"sdq: epoch {epoch + 1}: loss {means['loss']:.4f}, bits {bits}")

    train(
        run, material.batches, epochs=options.sdq_epochs, steps_an_epoch=material.steps_an_epoch,
        saved=material.saved("sdq", run), after=after,
    )  # fmt: skip
    in_time = run.finished
    plan = run.settle()
    notes = []
    if not in_time:
        notes.append(
            "SDQ's steps ran out before the bits fitted the budget: the last falls were chosen by "
            "the error of quantization alone"
        )
    history = [[step, list(bits.values())] for step, bits in run.history]
    return Choice(plan, run.trained(), notes, {"history": history, "betas": run.betas()})
