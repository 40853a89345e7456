"""Exit policies against brute force, the hand table, and themselves in their two passes."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy

from gfnet_dynn.choices import RULES
from gfnet_dynn.models.exit_policy import (
    NEVER,
    ExitPolicy,
    exit_probabilities,
    first_reached,
    keep_rows,
)
from shared_core.deploy import exit_policy as core


def random_case(seed, n=60, gates=4, classes=5, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(gates + 1, n, classes)) * scale).astype(np.float32)
    # Neighbouring exits often agree, so that patience has something to count.
    for exit_index in range(1, gates + 1):
        same = rng.random(n) < 0.6
        logits[exit_index, same] = logits[exit_index - 1, same]
    return logits, (rng.normal(size=(n, gates)) * 2).astype(np.float32)


def brute_force(kind, logits, gate_logits, thresholds, temperatures):
    """One sample after the other, in plain Python: float64, compared as float32."""
    gates, n = len(logits) - 1, len(logits[0])
    chosen = []
    for i in range(n):
        used, count, where = 0.0, 0, gates
        for e in range(gates):
            z = logits[e][i].astype(np.float64)
            p = np.sort(softmax(z / temperatures[e]))[::-1]
            g = expit(np.float64(gate_logits[i, e]))
            if kind == "gate":
                score = g
            elif kind == "jei":
                left = max(0.0, 1 - used)
                score = min(g, left) / left if left > 0 else 1.0
                used += g
            elif kind == "max_prob":
                score = p[0]
            elif kind == "entropy":
                score = 1 - entropy(p) / math.log(len(p))
            elif kind == "margin":
                score = p[0] - p[1]
            else:
                same = e > 0 and z.argmax() == logits[e - 1][i].argmax()
                count = count + 1 if same else 0
                score = count
            if np.float32(score) >= np.float32(thresholds[e]):
                where = e
                break
        chosen.append(where)
    return np.array(chosen)


def thresholds_for(kind, rng, gates=4):
    return rng.integers(0, gates, gates) if kind == "patience" else rng.uniform(0.1, 0.95, gates)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("seed", range(2))
def test_select_is_the_brute_force_rule(kind, seed):
    rng = np.random.default_rng(100 + seed)
    logits, gate_logits = random_case(seed)
    thresholds = thresholds_for(kind, rng)
    temperatures = rng.uniform(0.5, 3, 5)
    policy = ExitPolicy(kind, thresholds, temperatures)
    got = policy.select(logits, gate_logits)
    truth = brute_force(kind, logits, gate_logits, thresholds, temperatures)
    assert isinstance(got, np.ndarray) and got.dtype == np.int64
    assert np.array_equal(got, truth)
    assert 0 < len(set(truth.tolist()))
    as_torch = policy.select([torch.tensor(z) for z in logits], torch.tensor(gate_logits))
    assert np.array_equal(as_torch.numpy(), truth)


def incremental(policy, logits, gate_logits):
    """The other pass: one exit after the other, with rows dropped where samples leave."""
    logits, gate_logits = torch.tensor(logits), torch.tensor(gate_logits)
    n, gates = gate_logits.shape
    chosen = torch.full((n,), gates)
    rows, state = torch.arange(n), {}
    for e in range(gates):
        gate_logit = gate_logits[rows, e] if policy.needs_gates else None
        leaving = policy.leave(e, logits[e][rows], gate_logit, state)
        chosen[rows[leaving]] = e
        rows = rows[~leaving]
        keep_rows(state, (~leaving).nonzero().squeeze(1))
    return chosen.numpy()


def in_numpy(policy, logits, gate_logits):
    """The core's rule, which a shipped chain is run by, exit after exit."""
    rule = core.ExitPolicy.from_state(policy.state_dict())
    rows, state = np.arange(len(gate_logits)), {}
    chosen = np.full(len(rows), gate_logits.shape[1])
    for e in range(gate_logits.shape[1]):
        leaving = rule.leave(e, logits[e][rows], gate_logits[rows, e], state)
        chosen[rows[leaving]] = e
        core.keep_rows(state, np.flatnonzero(~leaving))
        rows = rows[~leaving]
    return chosen


@pytest.mark.parametrize("kind", RULES)
def test_all_passes_agree_also_on_ties(kind):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        gates = int(rng.integers(1, 7))
        logits, gate_logits = random_case(
            seed, n=int(rng.integers(2, 80)), gates=gates, classes=int(rng.integers(1, 6))
        )
        scores = ExitPolicy(kind).scores(logits, gate_logits)
        tie = float(scores[int(rng.integers(len(scores))), int(rng.integers(gates))])
        uniform = thresholds_for(kind, rng, gates)
        for thresholds in (uniform, float(rng.uniform(0, 1)), 0.0, 0.7, 0.9, tie, NEVER):
            policy = ExitPolicy(kind, thresholds)
            selected = policy.select(logits, gate_logits)
            assert np.array_equal(incremental(policy, logits, gate_logits), selected)
            assert np.array_equal(in_numpy(policy, logits, gate_logits), selected)
            assert np.array_equal(first_reached(scores.numpy(), thresholds), selected)


def test_everybody_leaves_at_one_exit():
    logits, gate_logits = random_case(3)
    for kind in RULES:
        for index in range(5):
            policy = ExitPolicy(kind, 0.5, 1.5).all_leave_at(index, 4)
            assert set(policy.select(logits, gate_logits).tolist()) == {index}
            assert (policy.kind, policy.temperatures) == (kind, (1.5,))


@pytest.mark.parametrize("kind", RULES)
def test_zero_sends_all_out_and_above_one_none(kind):
    logits, gate_logits = random_case(1, scale=40.0)
    gate_logits *= 50
    assert (ExitPolicy(kind, 0).select(logits, gate_logits) == 0).all()
    high = 4 if kind == "patience" else 1.0001
    assert (ExitPolicy(kind, high).select(logits, gate_logits) == 4).all()
    assert (ExitPolicy.never().select(logits, gate_logits) == 4).all()


@pytest.mark.parametrize("kind", [k for k in RULES if k != "patience"])
def test_higher_thresholds_never_leave_earlier_and_scores_stay_in_range(kind):
    logits, gate_logits = random_case(2)
    scores = ExitPolicy(kind).scores(logits, gate_logits)
    assert scores.min() >= -1e-6 and scores.max() <= 1 + 1e-6
    before = np.zeros(60, np.int64)
    for threshold in np.linspace(0, 1.1, 40):
        now = ExitPolicy(kind, threshold).select(logits, gate_logits)
        assert (now >= before).all()
        before = now


HAND_TABLE = [
    ((0.4, 0.4, 0.4, 0.4), (0.4, 0.4, 0.2, 0, 0), (0.4, 0.667, 1, None), 1),
    ((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1, 0.6), (0.1, 0.1111, 0.125, 0.1429), 4),
    ((0.6, 0.9, 0.2, 0.1), (0.6, 0.4, 0, 0, 0), (0.6, 1, None, None), 0),
    ((0.0, 0.0, 0.0, 0.0), (0, 0, 0, 0, 1), (0, 0, 0, 0), 4),
    ((1.0, 1.0, 0.0, 1.0), (1, 0, 0, 0, 0), (1, None, None, None), 0),
]


@pytest.mark.parametrize("gates, mass, conditional, leaves", HAND_TABLE)
def test_conditional_rule_by_hand(gates, mass, conditional, leaves):
    gates = torch.tensor([gates], dtype=torch.float64)
    assert torch.allclose(exit_probabilities(gates), torch.tensor([mass]).double(), atol=1e-9)
    gate_logits = torch.logit(gates).clamp(-800, 800)
    policy = ExitPolicy("jei", 0.5)
    logits = [torch.zeros(1, 3, dtype=torch.float64)] * 5
    scores = policy.scores(logits, gate_logits)[0]
    assert scores.isfinite().all()
    for score, expected in zip(scores.tolist(), conditional, strict=True):
        # Where no mass is left everything leaves; nobody who could leave is still there.
        assert score == pytest.approx(1.0 if expected is None else expected, abs=5e-4)
    assert policy.select(logits, gate_logits).item() == leaves


def test_exit_probabilities_sum_to_one_and_conditionals_telescope():
    g = torch.rand(500, 6, dtype=torch.float64)
    g[:50] = (g[:50] > 0.5).double()  # exact zeros and ones
    p = exit_probabilities(g)
    assert p.min() >= 0 and torch.allclose(p.sum(1), torch.ones(500).double(), atol=1e-12)
    zeros = [torch.zeros(500, 2, dtype=torch.float64)] * 7
    c = ExitPolicy("jei").scores(zeros, torch.logit(g).clamp(-800, 800))
    assert c.isfinite().all()
    stay = torch.ones(500, dtype=torch.float64)
    for e in range(6):
        assert torch.allclose(stay * c[:, e], p[:, e], atol=1e-6)
        stay = stay * (1 - c[:, e])
    assert torch.allclose(stay, p[:, 6], atol=1e-6)


def test_exit_probabilities_are_differentiable():
    g = torch.tensor([[0.3, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exit_probabilities, (g,))


def test_gates_are_not_looked_at_by_kinds_without_gates():
    logits, gate_logits = random_case(3)
    for kind in ("max_prob", "entropy", "margin", "patience"):
        policy = ExitPolicy(kind, 1 if kind == "patience" else 0.8)
        assert np.array_equal(policy.select(logits), policy.select(logits, gate_logits))
        assert not policy.needs_gates
    for kind in ("gate", "jei"):
        with pytest.raises(ValueError, match="got no gate logits"):
            ExitPolicy(kind).select(logits)


def test_head_temperatures_leave_gates_alone():
    logits, gate_logits = random_case(4)
    for kind in ("gate", "jei"):
        plain = ExitPolicy(kind, 0.6).select(logits, gate_logits)
        assert np.array_equal(ExitPolicy(kind, 0.6, 3.0).select(logits, gate_logits), plain)


@pytest.mark.parametrize("kind", RULES)
def test_json_round_trip(kind):
    policy = ExitPolicy(kind, [0.1, 0.5, 0.75, 2], (1.0, 2.0, 0.5, 1.5, 1.25))
    text = json.dumps(policy.state_dict(), allow_nan=False)
    assert ExitPolicy.from_state(json.loads(text)) == policy
    assert ExitPolicy(kind, 0.3).with_thresholds([0.1, 0.2]).thresholds == (0.1, 0.2)


def test_what_does_not_fit_is_refused():
    logits, gate_logits = random_case(6)
    with pytest.raises(ValueError, match=r"got shape \(60, 3\), expected \(60, 4\)"):
        ExitPolicy().select(logits, gate_logits[:, :3])
    with pytest.raises(ValueError, match="got 3 thresholds, expected one of"):
        ExitPolicy("gate", [0.5] * 3).select(logits, gate_logits)
    with pytest.raises(ValueError, match="got kind 'luck', expected one of"):
        ExitPolicy("luck")
