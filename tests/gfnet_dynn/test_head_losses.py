"""Exit probabilities and the weighted losses of the heads."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gfnet_dynn.train.exit_losses import (
    classifier_loss,
    exit_probabilities,
    sequential_probabilities,
)


def random_gates(n=500, g=4, seed=0):
    return torch.tensor(np.random.default_rng(seed).uniform(size=(n, g)))


def test_probabilities_sum_to_one():
    mass = exit_probabilities(random_gates())
    assert (mass >= 0).all()
    np.testing.assert_allclose(mass.sum(dim=1), 1.0, atol=1e-12)


def test_no_nan_for_gates_of_zero_and_one():
    gates = torch.tensor(list(product([0.0, 1.0], repeat=4)))
    mass = exit_probabilities(gates)
    for values in (mass, sequential_probabilities(gates)):
        assert torch.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()
    assert mass.sum(dim=1).tolist() == [1.0] * 16
    first_open = [(*row, 1.0).index(1.0) for row in gates.tolist()]
    assert mass.argmax(dim=1).tolist() == first_open


def make(seed=0, n=24, k=5, exits=4):
    rng = np.random.default_rng(seed)
    weights = [torch.tensor(rng.normal(size=(6, k)), requires_grad=True) for _ in range(exits)]
    x = torch.tensor(rng.normal(size=(n, 6)))
    labels = torch.tensor(rng.integers(0, k, n))
    gate_logits = torch.tensor(rng.normal(size=(n, exits - 1)), requires_grad=True)
    return weights, [x @ w for w in weights], labels, gate_logits


def gradients(loss, weights):
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def reference(logits, labels, gate_logits, count):
    """P and L in float64 NumPy, ``(N, count)``."""
    g = 1 / (1 + np.exp(-gate_logits.detach().numpy()))
    p = np.zeros((len(g), g.shape[1] + 1))
    for i, row in enumerate(g):
        for j, value in enumerate(row):
            p[i, j] = max(0.0, min(value, 1 - row[:j].sum()))
        p[i, -1] = 1 - p[i, :-1].sum()
    losses = np.zeros((len(g), count))
    for j in range(count):
        z = logits[j].detach().numpy()
        z = z - z.max(axis=1, keepdims=True)
        losses[:, j] = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels.numpy()]
    return p[:, :count], losses


@pytest.mark.parametrize("include_final", [False, True])
def test_values_match_the_definitions(include_final):
    _, logits, labels, gate_logits = make()
    p, losses = reference(logits, labels, gate_logits, 4 if include_final else 3)
    want = {
        "weighted": (p * losses).sum() / p.sum(),
        "boosted": losses.mean(),
        "legacy": losses.mean(),
    }
    for mode, value in want.items():
        got = classifier_loss(logits, labels, gate_logits, mode=mode, include_final=include_final)
        assert got.item() == pytest.approx(value, rel=1e-5), mode


def test_the_weights_change_the_gradient():
    weights, logits, labels, gate_logits = make()
    plain = gradients(classifier_loss(logits, labels, gate_logits, mode="legacy"), weights)
    boosted = gradients(classifier_loss(logits, labels, gate_logits, mode="boosted"), weights)
    assert max((a - b).abs().max() for a, b in zip(plain, boosted, strict=True)) > 1e-2
    # and to what the weighted mean with constant P says
    p, losses = reference(logits, labels, gate_logits, 3)
    ratio = losses.sum() / (p * losses).sum()
    for j in range(3):
        ce = F.cross_entropy(logits[j].float(), labels, reduction="none")
        want = gradients((ce * torch.tensor(p[:, j]) * ratio).sum() / losses.size, [weights[j]])[0]
        np.testing.assert_allclose(boosted[j], want, rtol=1e-4, atol=1e-6)


def test_weighted_and_boosted_differ_in_length_only():
    weights, logits, labels, gate_logits = make()
    flat = {
        mode: torch.cat(
            [
                g.flatten()
                for g in gradients(classifier_loss(logits, labels, gate_logits, mode=mode), weights)
            ]
        )
        for mode in ("weighted", "boosted")
    }
    cosine = F.cosine_similarity(flat["weighted"], flat["boosted"], dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-6)


def test_uniform_probabilities_give_the_plain_mean():
    weights, logits, labels, _ = make()
    g = torch.full((24, 3), 0.25).logit()  # p = 1/4 at each exit
    plain = gradients(classifier_loss(logits, labels, g, mode="legacy"), weights)
    for mode in ("weighted", "boosted"):
        found = gradients(classifier_loss(logits, labels, g, mode=mode), weights)
        for a, b in zip(plain, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_legacy_is_what_the_original_computed():
    """With gradients through the ratio, value and gradient are those of the plain mean."""
    weights, logits, labels, gate_logits = make()
    p, _ = reference(logits, labels, gate_logits, 3)
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits[:3]], dim=1)
    weighted = torch.tensor(p) * losses
    original = (weighted * (losses.sum() / weighted.sum())).mean()
    legacy = classifier_loss(logits, labels, gate_logits, mode="legacy")
    assert legacy.item() == pytest.approx(original.item(), rel=1e-6)
    pairs = zip(gradients(original, weights), gradients(legacy, weights), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["single", "weighted", "boosted", "legacy"])
def test_finite_when_the_cross_entropy_underflows(mode):
    labels = torch.tensor([0, 1, 2])
    sure = (F.one_hot(labels, 3) * 1e4).float()
    logits = [sure.clone().requires_grad_() for _ in range(3)]
    for gate_logits in (torch.zeros(3, 2), torch.full((3, 2), 200.0), torch.full((3, 2), -200.0)):
        loss = classifier_loss(logits, labels, gate_logits, mode=mode)
        assert loss.item() == 0
        for g in gradients(loss, logits):
            assert torch.isfinite(g).all()
    # all of the mass on a solved exit, all of the loss at the other
    logits = [sure.clone().requires_grad_(), (-sure).requires_grad_(), sure.clone()]
    loss = classifier_loss(logits, labels, torch.tensor([[200.0, 0.0]] * 3), mode=mode)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, logits[:2]))


@pytest.mark.parametrize("mode", ["single", "weighted", "boosted", "legacy"])
@pytest.mark.parametrize("include_final", [False, True])
def test_no_gradient_reaches_the_gates(mode, include_final):
    weights, logits, labels, gate_logits = make()
    loss = classifier_loss(logits, labels, gate_logits, mode=mode, include_final=include_final)
    assert torch.autograd.grad(loss, [gate_logits], allow_unused=True)[0] is None


def test_the_final_head_is_in_the_sum_only_when_asked():
    weights, logits, labels, gate_logits = make()
    without = gradients(classifier_loss(logits, labels, gate_logits), weights)
    assert without[3].abs().max() == 0
    loss = classifier_loss(logits, labels, gate_logits, include_final=True)
    assert gradients(loss, weights)[3].abs().max() > 0


def test_single_is_the_loss_at_the_exit_of_each_sample():
    _, logits, labels, gate_logits = make(n=60)
    g = gate_logits.detach().sigmoid().numpy()
    total, seen = 0.0, set()
    for i, row in enumerate(g):
        left, chosen = 1.0, 3
        for j, value in enumerate(row):
            c = 1.0 if left <= 0 else min(1.0, value / left)
            if c >= 0.5:
                chosen = j
                break
            left *= 1 - c
        seen.add(chosen)
        total += F.cross_entropy(logits[chosen][i : i + 1], labels[i : i + 1]).item()
    assert len(seen) > 2
    got = classifier_loss(logits, labels, gate_logits, mode="single")
    assert got.item() == pytest.approx(total / 60, rel=1e-5)


def test_refusals():
    _, logits, labels, gate_logits = make()
    with pytest.raises(ValueError, match="unknown classifier loss 'boost'"):
        classifier_loss(logits, labels, gate_logits, mode="boost")
    with pytest.raises(ValueError, match="3 gates for 3 exits"):
        classifier_loss(logits[:3], labels, gate_logits)
