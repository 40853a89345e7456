"""The loss, the weights of classes and the schedule, against NumPy and tables made by hand."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from sklearn.utils.class_weight import compute_class_weight

from shared_core.for_paddle.losses import cross_entropy
from visiondistill_gc.utils.loss import DistillationLoss, balanced_weights, target_cross_entropy
from visiondistill_gc.utils.train_utils import learning_rate

STUDENT = np.array([[1.0, 2, 3, 4], [2, 0, 1, 0]])
TEACHER = np.array([[0.0, 1, 0, 3], [1, 1, 1, 1]])
LABELS = np.array([3, 0])


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def tensor(values):
    return paddle.to_tensor(np.asarray(values, np.float32))


def one_hot(labels, classes=4):
    return np.eye(classes)[labels]


def test_golden_values():
    loss = DistillationLoss(temperature=4.0, alpha=0.5)
    found = loss(tensor(STUDENT), tensor(one_hot(LABELS)), tensor(TEACHER))
    assert found["ce"].item() == pytest.approx(0.467001, abs=2e-6)
    assert found["kd"].item() == pytest.approx(0.343633, abs=2e-6)
    assert found["loss"].item() == pytest.approx(0.405317, abs=2e-6)


def test_mixed_labels_both_count():
    rng = np.random.default_rng(0)
    logits, a, b = rng.normal(size=(6, 4)), rng.integers(0, 4, 6), rng.integers(0, 4, 6)
    for lam in (0.0, 0.3, 1.0):
        targets = lam * one_hot(a) + (1 - lam) * one_hot(b)
        rows, log_p = np.arange(6), log_softmax(logits)
        expected = -(lam * log_p[rows, a] + (1 - lam) * log_p[rows, b]).mean()
        found = target_cross_entropy(tensor(logits), tensor(targets)).item()
        assert found == pytest.approx(expected, abs=1e-6)


def test_class_weights_are_those_of_weighted_cross_entropy():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(9, 4)), rng.integers(0, 4, 9)
    weights = np.array([0.2, 1.0, 3.0, 0.7])
    found = target_cross_entropy(
        tensor(logits), tensor(one_hot(labels)), class_weights=tensor(weights)
    )
    rows = np.arange(9)
    by_hand = -(weights[labels] * log_softmax(logits)[rows, labels]).sum() / weights[labels].sum()
    assert found.item() == pytest.approx(by_hand, abs=1e-6)
    other = cross_entropy(tensor(logits), paddle.to_tensor(labels), class_weights=tensor(weights))
    assert found.item() == pytest.approx(other.item(), abs=1e-6)


def test_logits_far_apart_keep_their_gradient():
    logits = paddle.to_tensor([[200.0, 0.0]], stop_gradient=False)
    loss = target_cross_entropy(logits, tensor([[0.0, 1.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    assert logits.grad.numpy() == pytest.approx(np.array([[1.0, -1.0]]))


def test_gradient_reaches_the_student_only():
    student = paddle.to_tensor(STUDENT.astype(np.float32), stop_gradient=False)
    teacher = paddle.to_tensor(TEACHER.astype(np.float32), stop_gradient=False)
    loss = DistillationLoss(alpha=0.0)(student, tensor(one_hot(LABELS)), teacher)["loss"]
    loss.backward()
    assert teacher.grad is None
    p, q = np.exp(log_softmax(STUDENT / 4)), np.exp(log_softmax(TEACHER / 4))
    assert student.grad.numpy() == pytest.approx(4 * (p - q) / 2, abs=1e-6)  # T (p - q) / N


def test_alpha_one_asks_nobody():
    found = DistillationLoss(alpha=1.0)(tensor(STUDENT), tensor(one_hot(LABELS)))
    assert set(found) == {"loss", "ce"}
    with pytest.raises(ValueError, match="alpha 1"):
        DistillationLoss(alpha=0.5)(tensor(STUDENT), tensor(one_hot(LABELS)))


@pytest.mark.parametrize("words", [{"temperature": 0.0}, {"alpha": 1.1}, {"alpha": -0.1}])
def test_bad_loss(words):
    with pytest.raises(ValueError, match="expected"):
        DistillationLoss(**words)


def test_bad_shapes():
    with pytest.raises(ValueError, match="equal shapes"):
        target_cross_entropy(tensor(STUDENT), tensor(one_hot(LABELS)[:, :3]))
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        target_cross_entropy(
            tensor(STUDENT), tensor(one_hot(LABELS)), class_weights=tensor([1.0, 1.0])
        )


def test_balanced_weights():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 5)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_weights(labels, num_classes=3) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"\[7, 2, 5, 0\]"):
        balanced_weights(labels, num_classes=4)


# epoch: rate, for 1e-4, 50 epochs, 5 of warm-up; by hand from the original's rule.
GOLDEN = {0: 2e-5, 1: 4e-5, 4: 1e-4, 5: 1e-4, 8: 9.8907e-5, 27: 5.1745e-5, 49: 1.2179e-7}


@pytest.mark.parametrize(("epoch", "rate"), GOLDEN.items())
def test_schedule_by_epoch(epoch, rate):
    words = {"base": 1e-4, "epochs": 50, "warmup": 5}
    assert learning_rate(epoch, **words) == pytest.approx(rate, rel=1e-4)
    assert learning_rate(epoch + 0.9, **words) == learning_rate(epoch, **words)


def test_schedule_by_step():
    words = {"base": 2.0, "epochs": 10, "warmup": 2, "kind": "step"}
    assert learning_rate(0.5, **words) == pytest.approx(0.5)
    assert learning_rate(2.0, **words) == pytest.approx(2.0)
    assert learning_rate(6.0, **words) == pytest.approx(1.0)
    assert learning_rate(10.0, **words) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(4.0, **words) == pytest.approx(1 + math.cos(math.pi / 4))


@pytest.mark.parametrize("words", [{"base": 0.0}, {"warmup": 10}, {"kind": "week"}, {"warmup": -1}])
def test_bad_schedule(words):
    with pytest.raises(ValueError, match="expected"):
        learning_rate(0, **{"base": 1.0, "epochs": 10, "warmup": 2, **words})
