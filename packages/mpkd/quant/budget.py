"""A budget for bits: what each layer costs at each choice, the limit, and the choices that fit it.

Every search of this package gets its choices from a :class:`Budget` and hands its result to
:meth:`Budget.check`, so that none of them can exceed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpkd.quant.cost import LayerFacts
from mpkd.quant.layers import FLOAT

KINDS = ("size", "bops", "latency")
UNITS = {"size": "bits of all weights", "bops": "bit operations an image", "latency": "seconds"}
ROUNDING = 1e-9  # relative; sums of floats may differ in the last digits


@dataclass(frozen=True)
class BitPlan:
    """Bits of every layer.

    Attributes:
        w: bits a weight by layer, 2 to 16 or 32.
        a: bits an input value by layer, 2 to 16 or 32; the same layers.
    """

    w: dict[str, int]
    a: dict[str, int]

    def key(self) -> str:
        """A text that is the same for the same bits."""
        return ",".join(f"{name}={bits}/{self.a[name]}" for name, bits in self.w.items())


Table = Mapping[str, Mapping[tuple[int, int], float]]


class Budget:
    """The choices of each layer, their costs, and the most that all may cost together.

    Args:
        kind: ``size``, ``bops`` or ``latency``.
        table: cost by layer and ``(weight bits, input bits)``, for every pair of choices.
        limit: the most, in the unit of the table.
        w_options, a_options: choices by layer, in the order of the network. One choice = fixed.

    Raises:
        ValueError: even the cheapest plan costs more, or a pair has no cost.
    """

    def __init__(
        self,
        kind: str,
        table: Table,
        limit: float,
        *,
        w_options: Mapping[str, Sequence[int]],
        a_options: Mapping[str, Sequence[int]],
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"budget kind {kind!r}: expected one of {', '.join(KINDS)}")
        self.kind, self.table, self.limit = kind, table, float(limit)
        self.w_options = {name: tuple(sorted(set(row))) for name, row in w_options.items()}
        self.a_options = {name: tuple(sorted(set(a_options[name]))) for name in w_options}
        for name in self.names:
            for pair in self._pairs(name):
                if pair not in table.get(name, {}):
                    raise ValueError(
                        f"layer {name!r} has no cost at {pair[0]} bits a weight and {pair[1]} an "
                        "input, expected one for every choice"
                    )
        cheapest = self.cost(self.cheapest())
        if cheapest > self.limit * (1 + ROUNDING):
            raise ValueError(
                f"the cheapest choice of bits costs {cheapest:g} {self.unit}, expected at most "
                f"{self.limit:g}: raise the budget or allow fewer bits"
            )

    @property
    def names(self) -> list[str]:
        """The layers, in the order of the network."""
        return list(self.w_options)

    @property
    def unit(self) -> str:
        """What the cost counts."""
        return UNITS[self.kind]

    def _pairs(self, name: str) -> list[tuple[int, int]]:
        return [(w, a) for w in self.w_options[name] for a in self.a_options[name]]

    def cost(self, plan: BitPlan) -> float:
        """Sum over the layers."""
        return float(sum(self.table[n][plan.w[n], plan.a[n]] for n in self.names))

    def fits(self, plan: BitPlan) -> bool:
        """Whether the plan costs no more than the limit."""
        return self.cost(plan) <= self.limit * (1 + ROUNDING)

    def check(self, plan: BitPlan) -> BitPlan:
        """``plan``, or an error.

        Raises:
            ValueError: it costs more than the limit, or has bits that are no choice.
        """
        for name in self.names:
            if (plan.w.get(name), plan.a.get(name)) not in self._pairs(name):
                raise ValueError(
                    f"layer {name!r} has {plan.w.get(name)} bits a weight and {plan.a.get(name)} "
                    f"an input, expected of {self.w_options[name]} and {self.a_options[name]}"
                )
        if not self.fits(plan):
            raise ValueError(
                f"the bits cost {self.cost(plan):g} {self.unit}, expected at most {self.limit:g}"
            )
        return plan

    def cheapest(self) -> BitPlan:
        """Each layer at its cheapest choice."""
        best = {n: min(self._pairs(n), key=lambda pair: self.table[n][pair]) for n in self.names}
        return BitPlan({n: w for n, (w, _) in best.items()}, {n: a for n, (_, a) in best.items()})

    def largest(self) -> BitPlan:
        """Each layer at its most bits, whatever that costs."""
        return BitPlan(
            {n: self.w_options[n][-1] for n in self.names},
            {n: self.a_options[n][-1] for n in self.names},
        )

    def bring_within(self, plan: BitPlan) -> BitPlan:
        """``plan`` with bits taken from the last layers first until it fits.

        Sweep after sweep from the last layer to the first, inputs before weights, each loses one
        step of its choices where that makes it cheaper, and the sweep ends as soon as the plan
        fits. Where no single step helps (a latency may not fall with the bits) layers go to their
        cheapest choice, again from the last one.

        Source: Wang et al. 2019, arXiv:1811.08886, section 3.4 (resource constraint).
        """
        w, a = dict(plan.w), dict(plan.a)
        moved = True
        while moved and not self.fits(BitPlan(w, a)):
            moved = False
            for name in reversed(self.names):
                for bits, options in ((a, self.a_options[name]), (w, self.w_options[name])):
                    moved |= self._step_down(name, bits, options, w, a)
                    if self.fits(BitPlan(w, a)):
                        return BitPlan(w, a)
        last_resort = self.cheapest()
        for name in reversed(self.names):
            if self.fits(BitPlan(w, a)):
                break
            w[name], a[name] = last_resort.w[name], last_resort.a[name]
        return BitPlan(w, a)

    def _step_down(
        self,
        name: str,
        bits: dict[str, int],
        options: Sequence[int],
        w: Mapping[str, int],
        a: Mapping[str, int],
    ) -> bool:
        index = options.index(bits[name])
        if index == 0:
            return False
        before, present = self.table[name][w[name], a[name]], bits[name]
        bits[name] = options[index - 1]
        if self.table[name][w[name], a[name]] < before:
            return True
        bits[name] = present
        return False

    def uniform(self, bits: int) -> BitPlan:
        """The same bits for all weights (and all inputs that have a choice), but the fixed ones."""
        w = {n: bits if bits in row else row[-1] for n, row in self.w_options.items()}
        a = {n: bits if bits in row else row[-1] for n, row in self.a_options.items()}
        return BitPlan(w, a)

    def best_uniform(self) -> tuple[int, BitPlan] | None:
        """The most uniform bits that fit; None where not even the least do."""
        choices = sorted({b for row in self.w_options.values() if len(row) > 1 for b in row})
        for bits in reversed(choices):
            plan = self.uniform(bits)
            if self.fits(plan):
                return bits, plan
        return None

    def record(self, plan: BitPlan) -> dict[str, Any]:
        """Kind, limit, cost and unit, for a report."""
        return {
            "kind": self.kind,
            "limit": self.limit,
            "cost": self.cost(plan),
            "unit": self.unit,
        }


def layer_options(
    facts: Sequence[LayerFacts],
    candidates: Sequence[int],
    *,
    first_last: int | None = 8,
) -> dict[str, tuple[int, ...]]:
    """Choices by layer: ``candidates``, and one alone for the first and the last layer.

    Args:
        first_last: bits of the first and the last layer; None gives them all candidates.

    Raises:
        ValueError: no layers, no candidates, or a candidate out of range.
    """
    if not facts or not candidates:
        raise ValueError(
            f"{len(facts)} layers and {len(candidates)} candidates: expected some of both"
        )
    for bits in candidates:
        if bits != FLOAT and not 2 <= bits <= 16:
            raise ValueError(f"candidate of {bits} bits, expected 2 to 16, or 32 for none")
    options = {one.name: tuple(candidates) for one in facts}
    if first_last is not None:
        options[facts[0].name] = options[facts[-1].name] = (first_last,)
    return options


def size_budget(
    facts: Sequence[LayerFacts],
    mean: float,
    *,
    w_options: Mapping[str, Sequence[int]],
    a_options: Mapping[str, Sequence[int]],
) -> Budget:
    """At most ``mean`` bits a weight on average over all layers, fixed ones included."""
    table = {
        one.name: {
            (w, a): float(one.weights * w) for w in w_options[one.name] for a in a_options[one.name]
        }
        for one in facts
    }
    limit = mean * sum(one.weights for one in facts)
    return Budget("size", table, limit, w_options=w_options, a_options=a_options)


def bops_budget(
    facts: Sequence[LayerFacts],
    share: float,
    *,
    w_options: Mapping[str, Sequence[int]],
    a_options: Mapping[str, Sequence[int]],
) -> Budget:
    """At most ``share`` (in ``(0, 1]``) of the bit operations with 8 bits everywhere.

    Inputs that are left as they are (32 bits) count with 32, in the reference too.

    Raises:
        ValueError: the share is not in ``(0, 1]``.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share:g} of the 8-bit operations, expected (0, 1]")
    table = {
        one.name: {
            (w, a): float(one.macs * w * a)
            for w in w_options[one.name]
            for a in a_options[one.name]
        }
        for one in facts
    }
    reference = sum(
        one.macs * 8 * (FLOAT if tuple(a_options[one.name]) == (FLOAT,) else 8) for one in facts
    )
    return Budget("bops", table, share * reference, w_options=w_options, a_options=a_options)


def latency_budget(
    latencies: Mapping[str, Mapping[int, float]],
    multiple: float,
    *,
    w_options: Mapping[str, Sequence[int]],
    a_options: Mapping[str, Sequence[int]],
) -> Budget:
    """At most ``multiple`` of the time with 8 bits everywhere.

    Args:
        latencies: measured seconds by layer and weight bits, 8 among them
            (:func:`mpkd.deploy.layer_latency.latency_table`).
    """
    table = {
        name: {(w, a): latencies[name][w] for w in w_options[name] for a in a_options[name]}
        for name in w_options
    }
    limit = multiple * sum(row[8] for row in latencies.values())
    return Budget("latency", table, limit, w_options=w_options, a_options=a_options)
