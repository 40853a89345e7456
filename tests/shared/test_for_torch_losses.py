"""Losses and mixing in torch: limit cases, golden values, errors (values: tests/parity)."""

import math

import numpy as np
import pytest

from shared_core.datasets.views import mixing as draw

torch = pytest.importorskip("torch")
from shared_core.for_torch import losses, mixing  # noqa: E402

STUDENT = torch.tensor([[1.0, 2, 3, 4], [2, 0, 1, 0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 1, 0, 3], [1, 1, 1, 1]], dtype=torch.float64)
LABELS = torch.tensor([3, 0])


def test_golden_values():
    assert losses.cross_entropy(STUDENT, LABELS).item() == pytest.approx(0.467001, abs=5e-7)
    kl = losses.kd_kl(STUDENT, TEACHER, temperature=4.0).item()
    assert kl == pytest.approx(0.343633, abs=5e-7)


def test_limit_cases():
    assert losses.kd_kl(TEACHER, TEACHER, temperature=3.0).item() == pytest.approx(0, abs=1e-15)
    assert losses.js_divergence(TEACHER, TEACHER).item() == pytest.approx(0, abs=1e-15)
    far = 200 * torch.eye(2, dtype=torch.float64)
    assert losses.js_divergence(far, far.flip(0)).item() == pytest.approx(math.log(2))
    plain = losses.cross_entropy(STUDENT, LABELS).item()
    smooth = losses.label_smoothing_cross_entropy(STUDENT, LABELS, smoothing=0.0).item()
    one_hot = mixing.one_hot(LABELS, num_classes=4).double()
    assert plain == pytest.approx(smooth) == losses.soft_cross_entropy(STUDENT, one_hot).item()
    # a large temperature makes T^2 KL the squared distance of centred logits, over 2 C
    s, t = STUDENT - STUDENT.mean(1, keepdim=True), TEACHER - TEACHER.mean(1, keepdim=True)
    limit = ((s - t) ** 2).sum(1).mean().item() / 8
    got = losses.kd_kl(STUDENT, TEACHER, temperature=1e4).item()
    assert got == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("loss", [losses.mse_logits, losses.js_divergence])
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    (loss(student, teacher) + losses.kd_kl(student, teacher, temperature=2.0)).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_loss_errors():
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 3\), expected two equal shapes"):
        losses.kd_kl(STUDENT, TEACHER[:, :3], temperature=1.0)
    with pytest.raises(ValueError, match="temperature is 0, expected more than 0"):
        losses.kd_kl(STUDENT, TEACHER, temperature=0)
    with pytest.raises(ValueError, match="smoothing is 1.0"):
        losses.label_smoothing_cross_entropy(STUDENT, LABELS, smoothing=1.0)
    with pytest.raises(ValueError, match=r"expected \(N, C\) and \(N,\)"):
        losses.cross_entropy(STUDENT, LABELS[:1])
    with pytest.raises(ValueError, match=r"class_weights have shape \(3,\), expected \(4,\)"):
        losses.cross_entropy(STUDENT, LABELS, class_weights=torch.ones(3))


def test_mixing_limits_and_errors():
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    assert torch.equal(mixing.mixup(images, lam=1.0, permutation=[1, 0]), images)
    assert torch.equal(mixing.mixup(images, lam=0.0, permutation=[1, 0]), images.flip(0))
    whole = mixing.cutmix(images, box=(0, 0, 4, 5), permutation=[1, 0])
    assert torch.equal(whole, images.flip(0))
    assert torch.equal(mixing.cutmix(images, box=(2, 2, 2, 4), permutation=[1, 0]), images)
    pasted = mixing.cutmix(images, box=(1, 2, 3, 4), permutation=[1, 0])
    assert torch.equal(pasted[0, :, 1:3, 2:4], images[1, :, 1:3, 2:4])
    assert (pasted != images).sum() == 2 * 3 * 4
    with pytest.raises(ValueError, match="lam is 1.5"):
        mixing.mixup(images, lam=1.5, permutation=[1, 0])
    with pytest.raises(ValueError, match=r"permutation has shape \(1,\), expected \(2,\)"):
        mixing.mix_targets(torch.eye(2), lam=0.5, permutation=[0])
    with pytest.raises(ValueError, match="expected it inside 4 x 5 pixels"):
        mixing.cutmix(images, box=(0, 0, 5, 5), permutation=[1, 0])
    with pytest.raises(ValueError, match="smoothing is 1"):
        mixing.one_hot(LABELS, num_classes=4, smoothing=1)


def test_draws_repeat_and_have_their_distribution():
    def one(seed):
        rng = np.random.default_rng(seed)
        return draw.draw_cutmix(rng, 6, alpha=1.0, height=20, width=31)

    first, again = one(3), one(3)
    assert (first.lam, first.box) == (again.lam, again.box)
    assert np.array_equal(first.permutation, again.permutation)
    assert sorted(first.permutation) == list(range(6))
    for seed in range(200):
        mix = one(seed)
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 31
        assert mix.lam == pytest.approx(1 - (bottom - top) * (right - left) / 620)
    rng = np.random.default_rng(0)
    lams = [draw.draw_mixup(rng, 2, alpha=0.2).lam for _ in range(4000)]
    assert np.mean(lams) == pytest.approx(0.5, abs=0.03)
    assert np.var(lams) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)  # of Beta(a, a)


def test_draw_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="alpha is 0"):
        draw.draw_mixup(rng, 2, alpha=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        draw.draw_mixup(rng, 0, alpha=1)
    with pytest.raises(ValueError, match="image is 0 x 4 pixels"):
        draw.draw_cutmix(rng, 2, alpha=1, height=0, width=4)
