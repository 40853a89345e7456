"""HAQ: an agent walks through the layers and chooses the bits of each; the budget has a wall.

One episode: for each layer with a choice (weights, then inputs where these have one) the agent sees
ten numbers and answers in [0, 1], which is taken to one of the candidates. Where the result costs
too much, bits are taken away from the last layer backwards. The reward of the whole episode is
``0.1 * (accuracy - accuracy of the float network)`` in percentage points, about 0 at 8 bits.

The published search trains each trial for one epoch before it is scored. What ``score`` does is up
to the caller. Actions are remembered as they were carried out, after the wall: the critic then
learns about the bits that were scored.

Source: Wang et al. 2019, arXiv:1811.08886, sections 3.1 to 3.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from mpkd.quant.budget import BitPlan, Budget
from mpkd.quant.cost import layer_facts, plain_layer
from mpkd.quant.search.ddpg import Agent

REWARD_SCALE = 0.1  # for a percentage point of accuracy
STATE_SIZE = 10


@dataclass(frozen=True)
class Episode:
    """One try.

    Attributes:
        plan: the bits, within the budget.
        accuracy: what ``score`` said, in [0, 1].
        reward: see the module.
    """

    plan: BitPlan
    accuracy: float
    reward: float


@dataclass
class HaqResult:
    """The best episode and all of them in order."""

    best: Episode
    episodes: list[Episode] = field(default_factory=list)


def reward_of(accuracy: float, float_accuracy: float) -> float:
    """``0.1`` a percentage point gained; accuracies are fractions.

    Source: Wang et al. 2019, arXiv:1811.08886, equation 6.
    """
    return REWARD_SCALE * 100.0 * (accuracy - float_accuracy)


def bits_of(action: float, options: Sequence[int]) -> int:
    """The candidate of an action: equal parts of ``[0, 1]`` for each.

    For ``low .. high`` without gaps this is the published
    ``round(low - 0.5 + action * (high - low + 1))``.

    Raises:
        ValueError: an action outside of [0, 1].
    """
    if not 0 <= action <= 1:
        raise ValueError(f"action is {action}, expected [0, 1]")
    return options[min(int(action * len(options)), len(options) - 1)]


def action_of(bits: int, options: Sequence[int]) -> float:
    """The middle of the actions that give ``bits``."""
    return (options.index(bits) + 0.5) / len(options)


class Environment:
    """States, the way from actions to bits, and the wall.

    Args:
        net: not quantized.
        image_size: side in pixels.
        budget: choices, costs and the limit.

    Attributes:
        steps: ``(layer, "w" or "a")`` in the order in which the agent is asked.
    """

    def __init__(self, net: nn.Module, image_size: int, budget: Budget) -> None:
        self.budget = budget
        self.steps = [
            (name, part)
            for name in budget.names
            for part, options in (("w", budget.w_options), ("a", budget.a_options))
            if len(options[name]) > 1
        ]
        self.features = self._features(net, image_size)

    def _features(self, net: nn.Module, image_size: int) -> np.ndarray:
        """``(steps, 10)``, columns from 0 to 1; the ninth, the last action, is filled in later."""
        facts = {one.name: one for one in layer_facts(net, image_size)}
        rows = []
        for name, part in self.steps:
            layer = plain_layer(net, name)
            conv = isinstance(layer, nn.Conv2d)
            depthwise = conv and layer.groups > 1 and layer.groups == layer.in_channels
            rows.append([
                float(depthwise),
                layer.in_channels if conv else layer.in_features,
                layer.out_channels if conv else layer.out_features,
                layer.stride[0] if conv else 0,
                layer.kernel_size[0] if conv else 1,
                layer.weight.numel(),
                int(np.prod(facts[name].inputs)),
                list(facts).index(name),
                0.0,
                float(part == "a"),
            ])  # fmt: skip
        table = np.asarray(rows, dtype=np.float64).reshape(len(rows), STATE_SIZE)
        if not len(table):
            return table.astype(np.float32)
        low, high = table.min(axis=0), table.max(axis=0)
        return ((table - low) / np.where(high > low, high - low, 1)).astype(np.float32)

    def state(self, step: int, last_action: float) -> np.ndarray:
        """What the agent sees before ``step``."""
        state = self.features[step].copy()
        state[8] = last_action
        return state

    def plan(self, actions: Sequence[float]) -> BitPlan:
        """The bits of these actions, brought within the budget."""
        wanted = self.budget.largest()
        for (name, part), action in zip(self.steps, actions, strict=True):
            bits, options = (
                (wanted.w, self.budget.w_options)
                if part == "w"
                else (wanted.a, self.budget.a_options)
            )
            bits[name] = bits_of(action, options[name])
        return self.budget.check(self.budget.bring_within(wanted))

    def carried_out(self, plan: BitPlan) -> list[float]:
        """Actions that give ``plan``."""
        return [
            action_of(plan.w[name], self.budget.w_options[name])
            if part == "w"
            else action_of(plan.a[name], self.budget.a_options[name])
            for name, part in self.steps
        ]


def search_haq(
    environment: Environment,
    score: Callable[[BitPlan], float],
    *,
    float_accuracy: float,
    episodes: int = 600,
    warm_up: int = 20,
    seed: int = 0,
    report: Callable[[int, Episode], None] | None = None,
) -> HaqResult:
    """The plan of the best reward among ``episodes`` tries; of equal ones the cheapest.

    Args:
        score: accuracy in ``[0, 1]`` of the network with these bits. A plan that was scored before
            is not scored again.
        float_accuracy: of the network without quantization, in ``[0, 1]``.
        warm_up: episodes of random actions.
        seed: of agent and noise. The same seed and scores give the same search.
        report: called after each episode.

    Raises:
        ValueError: no episodes, or no layer has a choice.
    """
    if episodes < 1:
        raise ValueError(f"{episodes} episodes, expected at least 1")
    if not environment.steps:
        raise ValueError("no layer has a choice of bits, expected more than one candidate")
    agent = Agent(STATE_SIZE, warm_up=warm_up, seed=seed)
    known: dict[str, float] = {}
    result: HaqResult | None = None
    for number in range(episodes):
        actions: list[float] = []
        for step in range(len(environment.steps)):
            state = environment.state(step, actions[-1] if actions else 0.0)
            actions.append(agent.act(state, number))
        plan = environment.plan(actions)
        if plan.key() not in known:
            known[plan.key()] = score(plan)
        accuracy = known[plan.key()]
        episode = Episode(plan, accuracy, reward_of(accuracy, float_accuracy))
        done = environment.carried_out(plan)
        seen = [environment.state(i, done[i - 1] if i else 0.0) for i in range(len(done))]
        agent.observe(np.stack(seen), done, episode.reward)
        if number >= warm_up:
            for _ in environment.steps:
                agent.learn()
        if result is None:
            result = HaqResult(episode)
        elif _better(episode, result.best, environment.budget):
            result.best = episode
        result.episodes.append(episode)
        if report is not None:
            report(number, episode)
    return result  # type: ignore[return-value]  # there was at least one episode


def _better(one: Episode, other: Episode, budget: Budget) -> bool:
    if one.reward != other.reward:
        return one.reward > other.reward
    return budget.cost(one.plan) < budget.cost(other.plan)
