"""Who leaves where: scores by hand, ties, states; and chains that run only what is left."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from shared_core.deploy.exit_chain import ExitChain
from shared_core.deploy.exit_policy import KINDS, NEVER, ExitPolicy, keep_rows


def softmax_by_hand(row, temperature=1.0):
    powers = [math.exp((x - max(row)) / temperature) for x in row]
    return [power / math.fsum(powers) for power in powers]


def scores_by_hand(kind, logits, gates, temperature=1.0):
    """Scores (G) of one sample: ``logits`` G lists of K numbers, ``gates`` G numbers."""
    found, used, run, before = [], 0.0, 0, None
    for row, gate in zip(logits, gates, strict=True):
        p = sorted(softmax_by_hand(row, temperature), reverse=True)
        g = 1 / (1 + math.exp(-gate))
        left = max(0.0, 1 - used)
        best = row.index(max(row))
        run = run + 1 if best == before else 0
        found.append(
            {
                "max_prob": p[0],
                "margin": p[0] - p[1],
                "entropy": 1 + sum(x * math.log(x) for x in p if x) / math.log(len(p)),
                "gate": g,
                "jei": min(g, left) / left if left > 0 else 1.0,
                "patience": run,
            }[kind]
        )
        used, before = used + g, best
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_first_exits_are_those_by_hand(kind):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 60, 5)).astype(np.float32)
    gates = rng.normal(0, 1, (3, 60)).astype(np.float32)
    truth = np.array(
        [scores_by_hand(kind, logits[:, n].tolist(), gates[:, n].tolist()) for n in range(60)]
    )
    limit = 1 if kind == "patience" else float(np.median(truth))
    policy = ExitPolicy(kind, limit)
    state = {}
    rows, left_at = np.arange(60), np.full(60, 3)
    for index in range(3):
        gone = policy.leave(index, logits[index, rows], gates[index, rows], state)
        left_at[rows[gone]] = index
        keep_rows(state, np.flatnonzero(~gone))
        rows = rows[~gone]
    clear = (np.abs(truth - limit) > 1e-6).all(axis=1) | (kind == "patience")
    wanted = [next((i for i, s in enumerate(row) if s >= limit), 3) for row in truth]
    assert clear.sum() > 50 and len(set(wanted)) >= 3
    np.testing.assert_array_equal(left_at[clear], np.array(wanted)[clear])


def test_temperatures_divide_the_logits_of_their_own_exit():
    logits = np.array([[2.0, 0.0, 1.0]], np.float32)
    for index, temperature in enumerate((1.0, 3.0)):
        p = max(softmax_by_hand(logits[0].tolist(), temperature))
        for limit, leaves in ((p - 1e-6, True), (p + 1e-6, False)):
            policy = ExitPolicy("max_prob", limit, (1.0, 3.0))
            assert policy.leave(index, logits, None, {}).tolist() == [leaves]
    assert [ExitPolicy(temperatures=(2.0, 3.0)).temperature(n) for n in (0, 1, 2)] == [2, 3, 1]
    assert [ExitPolicy(temperatures=4.0).temperature(n) for n in (0, 7)] == [4, 4]


@pytest.mark.parametrize(("classes", "kind"), [(2, "max_prob"), (3, "max_prob"), (7, "max_prob")])
def test_a_score_equal_to_the_threshold_leaves_and_the_next_number_does_not(classes, kind):
    logits = np.full((1, classes), 0.3, np.float32)
    for limit, leaves in (
        (1 / classes, True),
        (np.float32(1 / classes), True),
        (np.nextafter(np.float32(1 / classes), np.float32(1)), False),
    ):
        assert ExitPolicy(kind, float(limit)).leave(0, logits, None, {}).tolist() == [leaves]


@pytest.mark.parametrize("kind", ["max_prob", "entropy", "margin"])
def test_the_order_of_a_sum_decides_nothing(kind):
    """In float32 the sum of 1,000 exponentials depends on its order; decisions must not."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (200, 1000)).astype(np.float32)
    turned = logits[:, rng.permutation(1000)]
    scores = [ExitPolicy(kind)._score(0, x, None, {}) for x in (logits, turned)]
    np.testing.assert_array_equal(*scores)
    for n in range(20):  # the score itself as a threshold
        policy = ExitPolicy(kind, float(scores[0][n]))
        assert policy.leave(0, turned[n : n + 1], None, {}).tolist() == [True]


def test_never_leaves_nobody_and_states_go_round():
    logits, gates = np.array([[50.0, 0]]), np.array([50.0])
    for kind in KINDS:
        policy = ExitPolicy(kind, NEVER, (1.5, 2.0))
        state = {}
        assert not any(policy.leave(n, logits, gates, state)[0] for n in range(9))
        text = json.dumps(policy.state_dict())
        assert ExitPolicy.from_state(json.loads(text)) == policy
    assert not ExitPolicy.never().leave(0, logits, None, {})[0]
    old = {**ExitPolicy("gate").state_dict(), "gate_temperatures": [1.0]}
    assert ExitPolicy.from_state(old) == ExitPolicy("gate")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"kind": "luck"}, "kind 'luck'"),
        ({"thresholds": []}, "finite numbers"),
        ({"thresholds": ["x"]}, "finite numbers"),
        ({"temperatures": [0.0]}, "> 0"),
        ({"more": 1}, "got entries"),
        ({"gate_temperatures": [2.0]}, "got entries"),
    ],
)
def test_a_damaged_state_is_an_error_of_one_line(change, said):
    with pytest.raises(ValueError, match=said):
        ExitPolicy.from_state({**ExitPolicy().state_dict(), **change})
    with pytest.raises(ValueError, match="got entries"):
        ExitPolicy.from_state("gate")


def test_a_policy_must_fit_the_number_of_exits():
    ExitPolicy("gate", (0.1, 0.2), (1, 2, 3)).check(2)
    for policy in (ExitPolicy("gate", (0.1, 0.2, 0.3)), ExitPolicy(temperatures=(1, 2))):
        with pytest.raises(ValueError, match="for 4 exits"):
            policy.check(4)


# -- chains ---------------------------------------------------------------------------------------


class Segment:
    """Stands for a session: what it gives is looked up by the images that come in."""

    def __init__(self, inputs, outputs, run):
        self._inputs, self._outputs, self._run, self.seen = inputs, outputs, run, []

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name in self._inputs]

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in self._outputs]

    def run(self, names, feed):
        self.seen.append(
            [int(x) for x in feed[self._inputs[0]].reshape(len(feed[self._inputs[0]]), -1)[:, 0]]
        )
        return self._run(**feed)


@pytest.fixture
def parts():
    """Image n (all pixels n) is sure at exit 0 if n % 3 == 0, at exit 1 if n % 3 == 1."""

    def head(number, sure):
        logits = np.zeros((len(number), 2), np.float32)
        logits[:, 0] = np.where(sure, 20, 0) + number / 1000
        return logits

    def first(images):
        number = images[:, 0, 0, 0].astype(np.int64)
        return head(number, number % 3 == 0), number, np.zeros(len(number)), number * 10

    def second(a, b):
        assert (b == a * 10).all()  # both carried values are cut alike
        return a, head(a, a % 3 == 1), np.zeros(len(a))

    def last(c):
        return (head(c, c < 0),)

    return [
        Segment(["images"], ["logits", "a", "gate_logit", "b"], first),
        Segment(["a", "b"], ["c", "logits", "gate_logit"], second),
        Segment(["c"], ["logits"], last),
    ]


def images(*numbers):
    return np.array(numbers, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)


def test_a_chain_computes_only_what_is_left(parts):
    chain = ExitChain(parts)
    assert chain.num_exits == 2 and chain.has_gates
    logits, exits = chain(images(0, 1, 2, 3, 4, 5, 6), ExitPolicy("max_prob", 0.9))
    assert exits.tolist() == [0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_allclose(logits[:, 0] % 20, np.arange(7) / 1000, atol=1e-5)
    assert [part.seen for part in parts] == [[[0, 1, 2, 3, 4, 5, 6]], [[1, 2, 4, 5]], [[2, 5]]]
    chain(images(0, 3), ExitPolicy("max_prob", 0.9))
    assert len(parts[1].seen) == 1 and len(parts[2].seen) == 1  # nobody was left


@pytest.mark.parametrize(("kind", "limit"), [("patience", 1), ("jei", 0.6), ("margin", 0.35)])
def test_a_chain_decides_as_a_full_pass_does(kind, limit):
    """What a rule remembers of an image goes on with that image alone."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (5, 50, 3)).astype(np.float32)
    logits += 2 * logits[:1]  # some agreement from head to head
    gates = rng.normal(0, 1, (4, 50)).astype(np.float32)

    def segment(n):
        def run(**feed):
            (taken,) = feed.values()
            rows = taken.reshape(len(taken), -1)[:, 0].astype(int)
            found = [logits[n, rows], gates[n, rows], rows] if n < 4 else [logits[n, rows]]
            return found

        outputs = ["logits", "gate_logit", "rows"] if n < 4 else ["logits"]
        return Segment(["images" if n == 0 else "rows"], outputs, run)

    chain = ExitChain([segment(n) for n in range(5)])
    out, exits = chain(images(*range(50)), ExitPolicy(kind, limit))
    scores = [scores_by_hand(kind, logits[:4, n].tolist(), gates[:, n].tolist()) for n in range(50)]
    wanted = [next((i for i, s in enumerate(row) if s >= limit), 4) for row in scores]
    assert len(set(wanted)) >= 3
    np.testing.assert_array_equal(exits, wanted)
    np.testing.assert_array_equal(out, logits[wanted, np.arange(50)])


def test_without_exits_everything_reaches_the_final_head(parts):
    _, exits = ExitChain(parts)(images(0, 1, 2), ExitPolicy.never())
    assert exits.tolist() == [2, 2, 2]


def test_segments_that_do_not_fit_are_refused(parts):
    with pytest.raises(ValueError, match="no segments"):
        ExitChain([])
    with pytest.raises(ValueError, match="segment 0 hands on"):
        ExitChain([parts[0], parts[2]])
    with pytest.raises(ValueError, match="expected 'logits'"):
        ExitChain([Segment(["x"], ["y"], None)])
    with pytest.raises(ValueError, match="for 2 exits"):
        ExitChain(parts)(images(1), ExitPolicy("gate", (0.1, 0.2, 0.3)))
