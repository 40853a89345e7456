"""The losses against NumPy in float64, SciPy and their limits; none of them knows a label."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy, pearsonr

from mpkd.trainer import distillation_loss as losses
from mpkd.trainer.distillation_loss import (
    LOSSES,
    DistillationLoss,
    MixedLoss,
    apprentice_loss,
    decoupled_kd,
    dist,
)


def logits(seed: int, n: int = 6, c: int = 5, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (n, c))


def value(loss: DistillationLoss, student: np.ndarray, teacher: np.ndarray) -> float:
    return float(loss(torch.tensor(student), torch.tensor(teacher)))


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_kl_is_scipys_times_the_square(t):
    s, q = logits(0), logits(1)
    wanted = t**2 * entropy(softmax(q / t, axis=1), softmax(s / t, axis=1), axis=1).mean()
    assert value(DistillationLoss("kl", temperature=t), s, q) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_js_is_scipys(t):
    s, q = logits(0), logits(1)
    wanted = t**2 * np.mean(
        jensenshannon(softmax(q / t, axis=1), softmax(s / t, axis=1), axis=1) ** 2
    )
    assert value(DistillationLoss("js", temperature=t), s, q) == pytest.approx(wanted, rel=1e-4)


def test_mse_is_on_the_logits():
    s, q = logits(0), logits(1)
    found = value(DistillationLoss("mse_logits", temperature=1), s, q)
    assert found == pytest.approx(((s - q) ** 2).mean(), rel=1e-5)


def by_hand_dkd(s, q, t, alpha, beta):
    total = 0.0
    for one, two in zip(s / t, q / t, strict=True):
        k = int(two.argmax())
        p, r = softmax(one), softmax(two)
        pair_p, pair_r = [p[k], 1 - p[k]], [r[k], 1 - r[k]]
        rest_p = np.delete(p, k) / np.delete(p, k).sum()
        rest_r = np.delete(r, k) / np.delete(r, k).sum()
        total += alpha * entropy(pair_r, pair_p) + beta * entropy(rest_r, rest_p)
    return total / len(s) * t**2


@pytest.mark.parametrize(("t", "alpha", "beta"), [(1, 1, 8), (4, 1, 8), (2, 0, 1), (2, 1, 0)])
def test_decoupled_distillation_by_hand(t, alpha, beta):
    s, q = logits(2), logits(3)
    found = decoupled_kd(torch.tensor(s), torch.tensor(q), temperature=t, alpha=alpha, beta=beta)
    assert float(found) == pytest.approx(by_hand_dkd(s, q, t, alpha, beta), rel=1e-9)


def test_decoupled_distillation_with_the_teachers_weight_is_kl():
    """KL = target part + (1 - p_target of the teacher) x rest part, for each image."""
    s, q = torch.tensor(logits(4, n=1)), torch.tensor(logits(5, n=1))
    rest = 1 - float(torch.softmax(q, 1).max())
    kl = losses.kd_kl(s, q, temperature=1.0)
    assert float(decoupled_kd(s, q, temperature=1.0, beta=rest)) == pytest.approx(float(kl))


def test_dist_is_scipys_correlation():
    s, q, t = logits(6), logits(7), 2.0
    p, r = softmax(s / t, axis=1), softmax(q / t, axis=1)
    between = 1 - np.mean([pearsonr(a, b)[0] for a, b in zip(p, r, strict=True)])
    within = 1 - np.mean([pearsonr(a, b)[0] for a, b in zip(p.T, r.T, strict=True)])
    found = dist(torch.tensor(s), torch.tensor(q), temperature=t, beta=1.5, gamma=0.5)
    assert float(found) == pytest.approx((1.5 * between + 0.5 * within) * t**2, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_zero_for_the_teacher_itself_and_finite_for_huge_logits(name):
    loss = DistillationLoss(name, temperature=1)
    q = logits(8)
    assert value(loss, q, q) == pytest.approx(0, abs=1e-5)
    student = torch.tensor(logits(9, scale=1e4), requires_grad=True)
    found = loss(student, torch.tensor(logits(10, scale=1e4)))
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_reaches_the_student_only_and_is_right(name):
    t = 1.0 if name == "mse_logits" else 2.0
    function = {
        "kl": lambda s, q: losses.kd_kl(s, q, temperature=t),
        "mse_logits": losses.mse_logits,
        "js": lambda s, q: losses.js_divergence(s / t, q / t) * t**2,
        "dkd": lambda s, q: decoupled_kd(s, q, temperature=t),
        "dist": lambda s, q: dist(s, q, temperature=t),
    }[name]
    student = torch.tensor(logits(11, 3, 4), requires_grad=True)
    teacher = torch.tensor(logits(12, 3, 4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: function(s, teacher), student)
    DistillationLoss(name, temperature=t)(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_teacher_only_losses_have_no_place_for_a_label():
    assert list(inspect.signature(DistillationLoss.forward).parameters) == [
        "self", "student_logits", "teacher_logits",
    ]  # fmt: skip


def test_half_precision_logits_are_computed_in_float32():
    s, q = torch.tensor(logits(0)).bfloat16(), torch.tensor(logits(1)).bfloat16()
    found = DistillationLoss("kl")(s, q)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(
        float(DistillationLoss("kl")(s.double(), q.double())), rel=1e-5
    )


def test_mixed_loss_between_its_limits():
    s, q, y = torch.tensor(logits(0)), torch.tensor(logits(1)), torch.tensor([0, 1, 2, 3, 4, 0])
    kl = DistillationLoss("kl", temperature=2.0)
    ce = -np.log(softmax(logits(0), axis=1)[np.arange(6), y.numpy()]).mean()
    assert float(MixedLoss(kl, alpha=0.0)(s, None, y)) == pytest.approx(ce, rel=1e-5)
    assert float(MixedLoss(kl, alpha=1.0)(s, q, y)) == pytest.approx(float(kl(s, q)), rel=1e-6)
    half = float(MixedLoss(kl, alpha=0.5)(s, q, y))
    assert half == pytest.approx((ce + float(kl(s, q))) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="no teacher logits"):
        MixedLoss(kl, alpha=0.5)(s, None, y)


def test_apprentice_terms_by_hand():
    s, q, y = logits(0), logits(1), np.array([0, 1, 2, 3, 4, 0])
    log_s, log_q = np.log(softmax(s, axis=1)), np.log(softmax(q, axis=1))
    rows = np.arange(6)
    own, soft = -log_s[rows, y].mean(), -(softmax(q, axis=1) * log_s).sum(axis=1).mean()
    teacher = torch.tensor(q, requires_grad=True)
    args = (torch.tensor(s), teacher, torch.tensor(y))
    fixed = apprentice_loss(*args, train_teacher=False)
    assert float(fixed) == pytest.approx(0.5 * own + 0.5 * soft, rel=1e-5)
    joint = apprentice_loss(*args, train_teacher=True)
    assert joint.item() == pytest.approx(0.5 * own + 0.5 * soft - log_q[rows, y].mean(), rel=1e-5)
    joint.backward()
    hard = torch.tensor(q, requires_grad=True)
    torch.nn.functional.cross_entropy(hard, torch.tensor(y)).backward()
    torch.testing.assert_close(
        teacher.grad, hard.grad, rtol=1e-5, atol=1e-7
    )  # nothing through the soft target


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DistillationLoss("kd"), "'kd': expected one of kl"),
        (lambda: DistillationLoss("kl", temperature=0), "temperature is 0"),
        (lambda: DistillationLoss("mse_logits"), "expected 1"),
        (lambda: MixedLoss(DistillationLoss(), alpha=1.5), "alpha is 1.5"),
        (lambda: DistillationLoss()(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(2, 4\), expected"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
