"""Where exits pay: train a network with many exits once, then keep the few that are worth it.

What is optimised, exactly: over the subsets S of the exits (the final head always stays) with at
most ``max_exits`` members, and over one threshold t shared by S, the accuracy on the calibration
split of "leave at the first exit of S whose score reaches t", subject to a mean cost of at most
the budget; equal accuracies go to the lower cost, then to fewer exits. The cost of leaving at exit
l is the backbone up to l plus the overheads (norm, head, gate) of the exits of S passed on the
way. All subsets are tried while they are at most ``limit``; above that, exits are dropped one at a
time, each time the one whose loss hurts least (a heuristic).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gfnet_dynn.decide.exit_outputs import ExitLogits, summarise
from gfnet_dynn.decide.thresholds import sweep
from gfnet_dynn.models import op_counter
from gfnet_dynn.models.exit_policy import ExitPolicy
from shared_core.metrics import total_macs

LIMIT = 20_000  # subsets tried before the search turns greedy; about a minute at 2,000 samples


@dataclass(frozen=True)
class Placement:
    """Exits worth keeping and the shared threshold that goes with them."""

    exits: tuple[int, ...]  # numbers 0..G-1 among the exits that were there
    blocks: tuple[int, ...]  # their block indices
    policy: ExitPolicy
    costs: NDArray  # cumulative MACs of the pruned network, (len(exits)+1,)
    calibration: dict  # of summarise(), pruned network on the calibration split
    exhaustive: bool  # whether all subsets were tried
    num_tried: int


def exit_overheads(model: nn.Module) -> NDArray:
    """MACs that an exit adds for each image that passes it: its norm, head and gate, ``(G,)``."""
    gate = op_counter.GATE_INPUTS if model.gate_kind == "unc" else 0
    layers = (op_counter.head_layers(model.backbone, block) for block in model.exits)
    return np.asarray([float(total_macs(one, elementwise=True) + gate) for one in layers])


def pruned_costs(costs: NDArray, overheads: NDArray, exits: Iterable[int]) -> NDArray:
    """Cumulative MACs when only ``exits`` (numbers 0..G-1, rising) and the final head are left.

    Args:
        costs: cumulative MACs with all exits, ``(G+1,)``.
        overheads: MACs of each exit, ``(G,)``.
    """
    kept = list(exits)
    num_gates = len(overheads)
    dropped = np.ones(num_gates)
    dropped[kept] = 0
    # What an image no longer pays before it reaches exit l (the exit itself it pays).
    saved = np.concatenate([[0.0], np.cumsum(dropped * overheads)])
    return np.asarray([costs[index] - saved[index] for index in [*kept, num_gates]])


def search(
    calibration: ExitLogits,
    policy: ExitPolicy,
    *,
    overheads: NDArray,
    mean_cost: float,
    max_exits: int | None = None,
    limit: int = LIMIT,
) -> Placement:
    """The best subset of exits under a budget; the module's docstring says what "best" is.

    Args:
        calibration: outputs of the network with all exits.
        policy: its kind and temperatures are used; its threshold is searched.
        overheads: of :func:`exit_overheads`.
        mean_cost: budget, MACs an image.
        max_exits: at most so many; all of them if None.
        limit: subsets that may be tried.

    Raises:
        ValueError: no subset meets the budget.
    """
    num_gates = calibration.num_gates
    if len(overheads) != num_gates:
        raise ValueError(f"{len(overheads)} overheads for {num_gates} exits; expected one for each")
    largest = num_gates if max_exits is None else min(max_exits, num_gates)
    if largest < 0:
        raise ValueError(f"max_exits is {max_exits}; expected 0 or more")
    subsets = sum(comb(num_gates, size) for size in range(largest + 1))
    trial = _Trial(calibration, policy, overheads, mean_cost)
    exhaustive = subsets <= limit
    trial.all_of(largest) if exhaustive else trial.drop_one_by_one(largest)
    if trial.best is None:
        raise ValueError(
            f"no placement of exits has a mean cost of {mean_cost:.6g} MACs or less; expected "
            f"{trial.cheapest:.6g} or more"
        )
    _, exits, threshold = trial.best
    costs = pruned_costs(calibration.costs, overheads, exits)
    found = _policy_of(policy, exits, num_gates).with_thresholds(threshold)
    return Placement(
        exits,
        tuple(calibration.exits[i] for i in exits),
        found,
        costs,
        summarise(calibration.keep(exits, costs=costs), found),
        exhaustive,
        trial.tried,
    )


class _Trial:
    """Best threshold of a subset, and the best subset so far."""

    def __init__(
        self, calibration: ExitLogits, policy: ExitPolicy, overheads: NDArray, mean_cost: float
    ):
        self.calibration, self.policy = calibration, policy
        self.overheads, self.mean_cost = overheads, mean_cost
        # The scores of these kinds depend on which exits came before.
        self.depends = policy.kind in ("jei", "patience")
        self.all_scores = None if self.depends else calibration.scores(policy)
        self.best: tuple[tuple, tuple[int, ...], float] | None = None
        self.cheapest = np.inf
        self.tried = 0

    def scores(self, subset: tuple[int, ...], costs: NDArray) -> NDArray:
        if not self.depends:
            return self.all_scores[:, list(subset)]
        kept = self.calibration.keep(subset, costs=costs)
        return kept.scores(_policy_of(self.policy, subset, self.calibration.num_gates))

    def __call__(self, subset: tuple[int, ...], *, eligible: bool = True) -> tuple:
        """Rank of a subset, larger is better; remembered if it may be the answer."""
        self.tried += 1
        costs = pruned_costs(self.calibration.costs, self.overheads, subset)
        correct = self.calibration.correct[[*subset, self.calibration.num_gates]]
        curve = sweep(self.scores(subset, costs), correct, costs)
        self.cheapest = min(self.cheapest, float(curve.cost[0]))
        allowed = curve.cost <= self.mean_cost * (1 + 1e-12)
        if not allowed.any():
            return (-1.0, -float(curve.cost[0]), -len(subset))
        accuracy = np.where(allowed, curve.accuracy, -1.0)
        # The first of the best is the cheapest of them: cost never falls with the threshold.
        place = int(accuracy.argmax())
        rank = (float(accuracy[place]), -float(curve.cost[place]), -len(subset))
        if eligible and (self.best is None or rank > self.best[0]):
            self.best = (rank, subset, float(curve.thresholds[place]))
        return rank

    def all_of(self, largest: int) -> None:
        """Every subset of at most ``largest`` exits."""
        for size in range(largest + 1):
            for subset in combinations(range(self.calibration.num_gates), size):
                self(subset)

    def drop_one_by_one(self, largest: int) -> None:
        """From all exits down, each time without the one that is missed least."""

        def consider(subset: tuple[int, ...]) -> tuple:
            return self(subset, eligible=len(subset) <= largest)

        kept = tuple(range(self.calibration.num_gates))
        consider(kept)
        while kept:
            kept = max((kept[:i] + kept[i + 1 :] for i in range(len(kept))), key=consider)


def _policy_of(policy: ExitPolicy, exits: Iterable[int], num_gates: int) -> ExitPolicy:
    """The policy with the temperatures of the exits that are left."""
    kept = list(exits)
    temperatures = tuple(policy.temperature(i) for i in (*kept, num_gates))
    return ExitPolicy(policy.kind, policy.thresholds[:1], temperatures)
