"""One door to all searches: a method's name, a budget, and out come the bits of every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mpkd.quant.budget import BitPlan, Budget
from mpkd.quant.finish import Material
from mpkd.quant.layers import fold_batch_norms, quantize_trained
from mpkd.quant.search.haq import Environment, Episode, search_haq
from mpkd.quant.search.mixquant import round_off_errors, within_budget
from mpkd.quant.search.sdq import Sdq
from mpkd.quant.search.sensitivity import choose_bits, sensitivities
from mpkd.quant.settings import SEARCHES, QuantSettings
from shared_core.checkpoints import atomic_write
from shared_core.for_torch.checkpoints import weights_sha256

SHOWN = 20  # a search says a line every so many episodes


@dataclass(frozen=True)
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
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class Scores:
    """Accuracies already measured, by bits; kept in a file so that a killed search replays them.

    Args:
        net: whose accuracies they are; those of other weights are dropped.
        path: a JSON file; None keeps nothing.
    """

    def __init__(self, net: nn.Module, path: Path | None) -> None:
        self.path, self.of = path, weights_sha256(net.state_dict())
        self.known: dict[str, float] = {}
        if path is not None and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
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


Search = Callable[[nn.Module, Budget, Material, QuantSettings, float], Choice]


def choose(
    student: nn.Module,
    budget: Budget,
    material: Material,
    settings: QuantSettings,
    *,
    float_accuracy: float,
) -> Choice:
    """The bits that ``settings.method`` chooses under ``budget``.

    Args:
        float_accuracy: of the student, in ``[0, 1]``.

    Raises:
        ValueError: an unknown method, or what the method needs is missing.
    """
    ways: dict[str, Search] = {
        "uniform": _uniform, "sensitivity": _sensitivity, "haq": _haq, "sdq": _sdq,
        "mixquant": _mixquant,
    }  # fmt: skip
    if settings.method not in ways:
        raise ValueError(f"search {settings.method!r}: expected one of {', '.join(SEARCHES)}")
    choice = ways[settings.method](student, budget, material, settings, float_accuracy)
    budget.check(choice.plan)
    return choice


def _uniform(student: nn.Module, budget: Budget, *_unused: object) -> Choice:
    found = budget.best_uniform()
    if found is None:
        return Choice(budget.check(budget.cheapest()), student)
    return Choice(found[1], student, details={"uniform_bits": found[0]})


def _sensitivity(
    student: nn.Module, budget: Budget, material: Material, *_unused: object
) -> Choice:
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


def _mixquant(student: nn.Module, budget: Budget, *_unused: object) -> Choice:
    folded = fold_batch_norms(student)
    bits = sorted({b for row in budget.w_options.values() for b in row})
    return Choice(within_budget(folded, round_off_errors(folded, bits), budget), student)


def _haq(
    student: nn.Module,
    budget: Budget,
    material: Material,
    settings: QuantSettings,
    float_accuracy: float,
) -> Choice:
    scores = Scores(student, material.cache)

    def measure(plan: BitPlan) -> float:
        trial = quantize_trained(
            student, plan.w, plan.a, calibration=material.calibration, method=settings.ranges,
            symmetric=settings.symmetric,
        )  # fmt: skip
        return material.evaluate(trial)

    def report(number: int, episode: Episode) -> None:
        if (number + 1) % SHOWN == 0:
            material.log(
                f"haq: episode {number + 1}/{settings.haq_episodes}: reward {episode.reward:.3f}"
            )

    found = search_haq(
        Environment(student, material.calibration.shape[-1], budget),
        lambda plan: scores.ask(plan, measure),
        float_accuracy=float_accuracy,
        episodes=settings.haq_episodes,
        warm_up=min(20, max(1, settings.haq_episodes // 10)),
        seed=settings.seed,
        report=report,
    )
    rewards = [episode.reward for episode in found.episodes]
    details = {"rewards": rewards, "plans_scored": len(scores.known)}
    return Choice(found.best.plan, student, details=details)


def _sdq(
    student: nn.Module,
    budget: Budget,
    material: Material,
    settings: QuantSettings,
    _float_accuracy: float,
) -> Choice:
    search = Sdq(student, budget, seed=settings.seed)
    material.trainer()("sdq", search.net, epochs=settings.search_epochs, companion=search)
    in_time = search.finished
    plan = search.settle()
    notes = () if in_time else (
        "SDQ's steps ran out before the bits fitted the budget: the last falls were chosen by the "
        "error of quantization alone",
    )  # fmt: skip
    history = [[step, list(bits.values())] for step, bits in search.history]
    details = {"history": history, "betas": search.betas()}
    return Choice(plan, search.trained(), notes, details)
