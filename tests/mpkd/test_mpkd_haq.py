"""HAQ: bits from actions, states in [0, 1], a wall for random actions, and it learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm
from torch import nn

from mpkd.quant.budget import BitPlan, bops_budget, layer_options, size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.search.ddpg import Agent, truncated_normal
from mpkd.quant.search.haq import (
    STATE_SIZE,
    Environment,
    action_of,
    bits_of,
    reward_of,
    search_haq,
)
from mpkd.quant.search.sensitivity import choose_bits

BITS = (2, 3, 4, 5, 6, 7, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


def environment(kind: str = "size", limit: float = 4.0, *, bits=BITS, first_last=None):
    facts = layer_facts(net(), 8)
    w = layer_options(facts, bits, first_last=first_last)
    if kind == "size":
        a = dict.fromkeys(w, (32,))
        return Environment(net(), 8, size_budget(facts, limit, w_options=w, a_options=a))
    return Environment(net(), 8, bops_budget(facts, limit, w_options=w, a_options=w))


def test_actions_are_the_published_rounding():
    for action in np.linspace(0, 1, 1001):
        published = int(np.clip(np.floor(2 - 0.5 + action * (8 - 2 + 1) + 0.5), 2, 8))
        assert bits_of(float(action), BITS) == published
    for options in (BITS, (2, 4, 8), (3,)):
        assert [bits_of(action_of(b, options), options) for b in options] == list(options)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        bits_of(1.1, BITS)


def test_states_are_scaled_and_tell_the_layers_apart():
    env = environment("bops", 0.3)
    assert env.steps == [(n, p) for n in ("0", "2", "6") for p in "wa"]
    assert env.features.shape == (6, STATE_SIZE)
    assert env.features.min() == 0 and env.features.max() == 1
    assert env.features[:, 0].tolist() == [0, 0, 1, 1, 0, 0]  # depthwise
    assert env.features[:, 9].tolist() == [0, 1] * 3  # weights, inputs
    assert env.state(2, 0.7)[8] == pytest.approx(0.7) and env.features[2, 8] == 0
    assert len({tuple(row) for row in env.features.tolist()}) == 6
    assert environment(limit=8, first_last=8).steps == [("2", "w")]


@pytest.mark.parametrize(
    ("kind", "limit"), [("size", 2.2), ("size", 5), ("bops", 0.1), ("bops", 1)]
)
def test_random_actions_stay_within_the_budget(kind, limit):
    env, rng = environment(kind, limit), np.random.default_rng(0)
    for _ in range(60):
        actions = rng.uniform(size=len(env.steps)).tolist()
        plan = env.plan(actions)
        assert env.budget.cost(plan) <= env.budget.limit * (1 + 1e-9)
        assert env.plan(env.carried_out(plan)) == plan
    assert env.budget.fits(env.plan([1.0] * len(env.steps)))


def test_the_noise_is_a_truncated_normal():
    rng = np.random.default_rng(0)
    for mean, deviation in ((0.3, 0.5), (0.95, 0.1)):
        draws = [truncated_normal(rng, mean, deviation) for _ in range(800)]
        ends = (0 - mean) / deviation, (1 - mean) / deviation
        assert kstest(draws, truncnorm(*ends, loc=mean, scale=deviation).cdf).pvalue > 0.001


def test_the_agent_learns_what_is_rewarded():
    agent = Agent(STATE_SIZE, warm_up=0, seed=1)
    states = np.zeros((1, STATE_SIZE), dtype=np.float32)
    before = abs(agent.policy(states[0]) - 0.9)
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = float(rng.uniform())
        agent.observe(states, [action], -abs(action - 0.9))
        agent.learn()
    for _ in range(200):
        agent.learn()
    assert abs(agent.policy(states[0]) - 0.9) < 0.5 * before


def weighted_score(plan: BitPlan) -> float:
    """Each layer loses ``4 ** -bits`` times a weight of its own."""
    return 1 - sum(s * 4.0 ** -plan.w[n] for n, s in (("0", 0.1), ("2", 4.0), ("6", 1.0)))


def test_the_search_is_near_the_best_of_all_and_repeats_itself():
    env = environment("size", 3.5, bits=(2, 3, 4, 8))
    scored = []
    found = search_haq(
        env, lambda plan: scored.append(plan.key()) or weighted_score(plan), float_accuracy=1.0,
        episodes=80, warm_up=40, seed=0,
    )  # fmt: skip
    assert len(scored) == len(set(scored)) <= 64  # no plan twice
    plans = [
        BitPlan(dict(zip(("0", "2", "6"), w, strict=True)), env.budget.largest().a)
        for w in itertools.product((2, 3, 4, 8), repeat=3)
    ]
    scores = sorted((weighted_score(p) for p in plans if env.budget.fits(p)), reverse=True)
    assert found.best.accuracy >= scores[1]
    assert found.best.reward == pytest.approx(10 * (found.best.accuracy - 1))
    assert all(env.budget.fits(e.plan) for e in found.episodes) and len(found.episodes) == 80
    again = search_haq(
        env, weighted_score, float_accuracy=1.0, episodes=80, warm_up=40, seed=0
    )  # fmt: skip
    assert [e.plan for e in again.episodes] == [e.plan for e in found.episodes]
    other = search_haq(env, weighted_score, float_accuracy=1.0, episodes=5, warm_up=5, seed=1)
    assert [e.plan for e in other.episodes] != [e.plan for e in found.episodes[:5]]


@pytest.mark.slow
def test_the_agent_beats_random_search_on_ten_layers():
    """The mean over planted problems of how far each comes from uniform bits to the best of all."""
    widths = (3, 8, 8, 16, 16, 32, 32, 64, 64, 64)
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
    deep = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    facts = layer_facts(deep, 8)
    w = layer_options(facts, BITS, first_last=None)
    budget = size_budget(facts, 4.0, w_options=w, a_options=dict.fromkeys(w, (32,)))
    env, a = Environment(deep, 8, budget), budget.largest().a
    cost = {n: {b: budget.table[n][b, 32] for b in BITS} for n in budget.names}
    ways: dict[str, list[float]] = {"agent": [], "random": []}
    for problem in range(100, 105):
        rng = np.random.default_rng(problem)
        planted = dict(zip(budget.names, 10 ** rng.uniform(-1.5, 1, len(facts)), strict=True))

        def score(plan: BitPlan, planted=planted) -> float:
            return 1 - sum(s * 4.0 ** -plan.w[n] for n, s in planted.items())

        damage = {n: {b: s * 4.0**-b for b in BITS} for n, s in planted.items()}
        best = score(BitPlan(choose_bits(damage, cost, budget.limit), a))
        uniform = score(budget.best_uniform()[1])
        for name, warm_up in (("agent", 20), ("random", 200)):
            found = search_haq(
                env, score, float_accuracy=1.0, episodes=200, warm_up=warm_up, seed=problem
            ).best.accuracy
            ways[name].append((found - uniform) / (best - uniform))
    assert np.mean(ways["agent"]) > np.mean(ways["random"]) + 0.1
    assert min(ways["agent"]) > 0  # never worse than uniform bits


def test_the_search_learns_from_what_was_scored(monkeypatch):
    """After the warm-up, an update a layer and episode, from bits as they were carried out."""
    learned, observed, scores = [], [], iter(np.linspace(0.5, 0.9, 12))
    learn, observe = Agent.learn, Agent.observe
    monkeypatch.setattr(Agent, "learn", lambda self: learned.append(learn(self)))
    monkeypatch.setattr(
        Agent, "observe", lambda self, s, a, r: observed.append((a, r)) or observe(self, s, a, r)
    )
    env = environment(limit=3.0)
    found = search_haq(env, lambda plan: next(scores), float_accuracy=0.9, episodes=10, warm_up=4)
    assert len(learned) == (10 - 4) * len(env.steps) and len(observed) == 10
    for (actions, reward), episode in zip(observed, found.episodes, strict=True):
        assert actions == env.carried_out(episode.plan) and reward == episode.reward


def test_the_reward_counts_points():
    assert reward_of(0.71, 0.76) == pytest.approx(-0.5) and reward_of(0.7, 0.7) == 0


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match="0 episodes"):
        search_haq(environment(), weighted_score, float_accuracy=1.0, episodes=0)
    with pytest.raises(ValueError, match="no layer has a choice"):
        search_haq(environment(bits=(3,)), weighted_score, float_accuracy=1.0, episodes=1)
