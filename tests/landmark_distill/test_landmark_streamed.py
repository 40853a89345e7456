"""The streamed loss: equal to that through whole logits, in value and gradient, and in NumPy."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.head.distillation import KDSettings, full_losses
from landmark_distill.head.softmax_sums import Softmax, stream
from landmark_distill.head.streamed_loss import (
    EXTRA,
    SoftLabels,
    label_rows,
    soft_labels,
    streamed_losses,
)
from shared_core.knowledge import KnowledgeError, KnowledgeStore

N, C, D = 6, 53, 16


def batch(dtype=torch.float64, *, scale=32.0, margin=0.1, unit=False, near=0.0, seed=0):
    """A head in training mode, student and teacher features (``near`` their class), labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(C, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (N,), generator=generator)
    labels[:2] = torch.tensor([0, C - 1])  # the ends
    student, teacher = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    student, teacher = student + near * weight[labels], teacher + near * weight[labels]
    if unit:
        weight = weight / weight.norm(dim=1, keepdim=True)
    head = CosineMarginHead.around(weight.to(dtype), scale=scale, margin=margin).train()
    return head, student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def both(head, student, teacher, labels, kd, *, chunk=17, weight=0.7):
    """Total loss and gradient, through whole logits and streamed."""
    whole = full_losses(student, head, labels=labels, teacher_features=teacher, kd=kd)
    soft = (
        None if teacher is None else soft_labels(teacher, head, labels=labels, kd=kd, chunk=chunk)
    )
    ours = streamed_losses(student, head, labels=labels, soft=soft, kd=kd, chunk=chunk)
    found = []
    for losses in (whole, ours):
        parts = [p for p in (losses.ce, losses.kd) if p is not None]
        total = parts[0] + weight * parts[1] if len(parts) == 2 else parts[0]
        found.append((parts, torch.autograd.grad(total, student)[0], losses.correct))
    return found


def check(found, *, value, gradient, scale=32.0):
    """Relative, and to the last digits of the scores: a loss is a difference of such numbers."""
    (parts, wanted, right), (ours, mine, also_right) = found
    assert len(parts) == len(ours)
    for a, b in zip(parts, ours, strict=True):
        assert b.item() == pytest.approx(a.item(), rel=value, abs=value * scale / 16)
    assert (mine - wanted).norm() <= gradient * (wanted.norm() + scale / 32)
    assert (right is None) == (also_right is None)
    if right is not None:
        assert torch.equal(right, also_right)


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("scale", [1.0, 32.0, 500.0, 1e4])
@pytest.mark.parametrize("unit", [False, True])
def test_equal_to_whole_logits_in_float64(variant, scale, unit):
    for margin, temperature, near in itertools.product((0.0, 0.1, 0.9), (0.5, 1.0, 4.0), (0, 2)):
        inputs = batch(scale=scale, margin=margin, unit=unit, near=near)
        found = both(*inputs, KDSettings(variant, temperature))
        check(found, value=1e-12, gradient=1e-12, scale=scale / temperature)


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("training", [True, False])
def test_margin_is_for_training_only(variant, training):
    head, *rest = batch(margin=0.4)
    head.train(training)
    check(both(head, *rest, KDSettings(variant)), value=1e-11, gradient=1e-11)


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("scale", [32.0, 1e4])
def test_equal_in_float32(variant, scale):
    for near in (0, 5):
        found = both(*batch(torch.float32, scale=scale, near=near), KDSettings(variant))
        check(found, value=1e-5, gradient=1e-5, scale=scale)


@pytest.mark.parametrize("chunk", [1, 2, 52, 53, 54, 10_000])
def test_any_chunk_gives_the_same(chunk):
    check(both(*batch(), KDSettings(), chunk=chunk), value=1e-11, gradient=1e-11)


def test_labels_absent():
    head, student, teacher, _ = batch()
    check(both(head, student, teacher, None, KDSettings()), value=1e-11, gradient=1e-11)


def test_teacher_absent():
    head, student, _, labels = batch()
    check(both(head, student, None, labels, KDSettings()), value=1e-11, gradient=1e-11)


def test_one_sample_one_class():
    head = CosineMarginHead.around(torch.randn(1, 3, dtype=torch.float64)).train()
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    losses = streamed_losses(x, head, labels=torch.tensor([0]))
    losses.ce.backward()
    assert losses.ce.item() == pytest.approx(0, abs=1e-12)
    assert x.grad.abs().max() < 1e-12


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("scale", [8.0, 500.0])
def test_gradient_is_that_of_finite_differences(variant, scale):
    kd = KDSettings(variant, 3.0)
    head, student, teacher, labels = batch(scale=scale)
    soft = soft_labels(teacher, head, labels=labels, kd=kd)

    def losses(x):
        found = streamed_losses(x, head, labels=labels, soft=soft, kd=kd, chunk=20)
        return found.ce, found.kd

    assert torch.autograd.gradcheck(losses, (student,), eps=1e-7, atol=1e-5, rtol=1e-4)


def numpy_sums(unit, weight, labels, *, scale, shrink, temperature):
    """Log-sum-exp, softmax-mean row and label probability, from the definition."""
    rows = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    z = (scale * unit @ rows.T - shrink * np.eye(len(weight))[labels]) / temperature
    peak = z.max(1, keepdims=True)
    log_sum = np.log(np.exp(z - peak).sum(1)) + peak[:, 0]
    p = np.exp(z - log_sum[:, None])
    return log_sum, p @ rows, p[np.arange(len(z)), labels], -(p * np.log(p + 1e-300)).sum(1)


@pytest.mark.parametrize("scale", [5.0, 32.0, 400.0])
def test_sums_are_those_of_numpy(scale):
    head, student, _, labels = batch(scale=scale)
    unit = torch.nn.functional.normalize(student.detach(), dim=1)
    views = [Softmax(), Softmax(4.0), Softmax(1.0, 3.0), Softmax(0.3, 2.0)]
    found, _ = stream(unit, head, views, labels=labels, chunk=10, dtype=torch.float64)
    for view, sums in zip(views, found, strict=True):
        log_sum, mean, label, _ = numpy_sums(
            unit.numpy(), head.weight.numpy(), labels.numpy(),
            scale=scale, shrink=view.shrink, temperature=view.temperature,
        )  # fmt: skip
        np.testing.assert_allclose(sums.log_sum, log_sum, rtol=1e-12)
        np.testing.assert_allclose(sums.mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(sums.log_label.exp(), label, rtol=1e-9, atol=1e-300)


def test_soft_label_is_that_of_numpy():
    head, _, teacher, labels = batch()
    for kd in (KDSettings("original", 4.0), KDSettings("canonical", 4.0)):
        soft = soft_labels(teacher, head, labels=labels, kd=kd, chunk=9)
        unit = teacher.numpy() / np.linalg.norm(teacher.numpy(), axis=1, keepdims=True)
        _, mean, label, entropy = numpy_sums(
            unit, head.weight.numpy(), labels.numpy(), scale=head.scale, shrink=kd.shrink(head),
            temperature=kd.teacher_temperature,
        )  # fmt: skip
        np.testing.assert_allclose(soft.mean, mean, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(soft.entropy, entropy, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(soft.label, label, rtol=1e-10)


def test_taking_the_margin_off_the_sum_would_cancel():
    """A label with nearly all of the probability: the sum without it has no digits left."""
    head, student, teacher, labels = batch(torch.float32, scale=32.0, margin=0.9, near=1000.0)
    kd = KDSettings("original", 1.0)
    found = both(head, student, teacher, labels, kd)
    wide = both(head.double(), student.double().detach().requires_grad_(), teacher.double(),
                labels, kd)  # fmt: skip
    assert found[1][0][0].item() == pytest.approx(wide[0][0][0].item(), rel=1e-4)
    z = torch.exp(torch.tensor(32.0)) * (1 + torch.rand(1) * 1e-9)  # what that way would leave
    assert (z - torch.exp(torch.tensor(32.0))).item() == 0


def test_equal_features_have_no_divergence():
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        head, student, _, labels = batch(dtype)
        for kd in (KDSettings("canonical", 2.0), KDSettings("original", 1.0)):
            soft = soft_labels(student.detach(), head, labels=labels, kd=kd)
            losses = streamed_losses(student, head, labels=labels, soft=soft, kd=kd)
            gradient = torch.autograd.grad(losses.kd, student)[0]
            assert abs(losses.kd.item()) < bound * 10
            assert gradient.abs().max() < bound * 10


@pytest.mark.parametrize("way", ["head", "autocast"])
def test_bfloat16(way):
    head, student, teacher, labels = batch(torch.float32, near=1.0, unit=True)
    kd = KDSettings()
    wanted = both(head, student, teacher, labels, kd)[0]
    if way == "head":
        head = CosineMarginHead.around(head.weight.bfloat16()).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        soft = soft_labels(teacher, head, labels=labels, kd=kd)
        losses = streamed_losses(student, head, labels=labels, soft=soft, kd=kd)
    assert losses.ce.dtype == losses.kd.dtype == torch.float32
    gradient = torch.autograd.grad(losses.ce + 0.7 * losses.kd, student)[0]
    assert losses.ce.item() == pytest.approx(wanted[0][0].item(), rel=0.02)
    assert losses.kd.item() == pytest.approx(wanted[0][1].item(), rel=0.02)
    assert (gradient - wanted[1]).norm() < 0.02 * wanted[1].norm()
    assert not torch.equal(gradient, wanted[1])  # it was indeed another precision


def test_float16_has_not_the_range_and_is_widened():
    head, student, teacher, labels = batch(torch.float32, near=1.0, unit=True)
    wanted = both(head, student, teacher, labels, KDSettings())[0]
    half = CosineMarginHead.around(head.weight.half()).train()
    found = both(half.float().half(), student.half().float().detach().requires_grad_(),
                 teacher, labels, KDSettings())[1]  # fmt: skip
    assert found[0][0].item() == pytest.approx(wanted[0][0].item(), rel=5e-3)
    assert (found[1] - wanted[1]).norm() < 5e-3 * wanted[1].norm()


def test_half_features_get_half_gradients():
    head, student, teacher, labels = batch(torch.float32)
    x = student.detach().bfloat16().requires_grad_()
    streamed_losses(x, head, labels=labels).ce.backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


def test_without_gradients_no_means_are_made():
    head, student, _, labels = batch()
    with torch.no_grad():
        losses = streamed_losses(student, head, labels=labels)
    assert not losses.ce.requires_grad
    wanted = full_losses(student, head, labels=labels)
    assert losses.ce.item() == pytest.approx(wanted.ce.item(), rel=1e-12)
    unit = torch.nn.functional.normalize(student.detach(), dim=1)
    (sums,), best = stream(unit, head, [Softmax()], means=False)
    assert sums.mean is None and best is None


def test_losses_can_be_weighted_and_scaled():
    """A loss scaler multiplies the loss; the gradient must follow."""
    head, student, teacher, labels = batch()
    soft = soft_labels(teacher, head)
    losses = streamed_losses(student, head, labels=labels, soft=soft)
    one = torch.autograd.grad(losses.ce, student, retain_graph=True)[0]
    two = torch.autograd.grad(losses.kd, student, retain_graph=True)[0]
    both_ = torch.autograd.grad(1024 * (losses.ce - 3 * losses.kd), student)[0]
    torch.testing.assert_close(both_, 1024 * (one - 3 * two))


@pytest.mark.parametrize(
    "dtype, value, gradient", [("float32", 1e-6, 1e-6), ("float16", 2e-3, 2e-3)]
)
def test_soft_labels_in_the_knowledge_store(tmp_path, dtype, value, gradient):
    head, student, teacher, labels = batch(torch.float32)
    kd = KDSettings("original", 4.0)
    keys = [f"{i:032x}" for i in range(N)]
    soft = soft_labels(teacher, head, labels=labels, kd=kd)
    about = {"teacher_hash": "0" * 64, "view": {"size": 32, **kd.facts(head)}}
    with KnowledgeStore.create(
        tmp_path / "store", classes=soft.width, kind="features", dtype=dtype, **about
    ) as store:
        store.put(keys, 0, soft.pack())
    again = SoftLabels.unpack(KnowledgeStore.open(tmp_path / "store", **about).get(keys, 0))
    assert again.width == D + EXTRA
    torch.testing.assert_close(again.entropy, soft.entropy.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.label, soft.label.double(), rtol=1e-5, atol=1e-6)
    found = []
    for each in (soft, again):
        losses = streamed_losses(student, head, labels=labels, soft=each, kd=kd)
        found.append((losses.kd.item(), torch.autograd.grad(losses.kd, student)[0]))
    assert found[1][0] == pytest.approx(found[0][0], rel=value)
    assert (found[1][1] - found[0][1]).norm() <= gradient * found[0][1].norm()
    other = {**about, "view": {"size": 32, **KDSettings("original", 2.0).facts(head)}}
    KnowledgeStore.open(tmp_path / "store", **other)  # the original's teacher has no temperature
    other = {**about, "view": {"size": 32, **KDSettings("canonical", 4.0).facts(head)}}
    with pytest.raises(KnowledgeError, match="view"):
        KnowledgeStore.open(tmp_path / "store", **other)


def test_bytes_of_a_soft_label():
    """Of the recipe's 1,024 features: 2,056 bytes in float16, 4,112 in float32."""
    soft = SoftLabels(torch.zeros(1, 1024), torch.zeros(1), torch.zeros(1))
    packed = soft.pack()
    assert packed.dtype == np.float32 and packed.nbytes == 4112
    assert packed.astype(np.float16).nbytes == 2056


MEMORY = """
import torch
from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.head.streamed_loss import soft_labels, streamed_losses
torch.set_num_threads(1)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
def step(classes, n):
    head = CosineMarginHead.around(torch.nn.functional.normalize(torch.randn(classes, 32))).train()
    x, y = torch.randn(n, 32, requires_grad=True), torch.randint(classes, (n,))
    before = peak()
    losses = streamed_losses(x, head, labels=y, soft=soft_labels(x.detach(), head), chunk=1024)
    (losses.ce + losses.kd).backward()
    return peak() - before
step(3000, 8)
print(step(100_000, 256))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_matrix_of_samples_by_classes_is_ever_there():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert float(done.stdout) < 20  # MiB; one matrix of logits has 98


class TestErrors:
    """What cannot be answered is refused in one line."""

    def test_head_that_learns(self):
        head = CosineMarginHead(5, 4)
        with pytest.raises(ValueError, match="the head requires a gradient"):
            streamed_losses(torch.randn(2, 4), head, labels=torch.tensor([0, 1]))
        head.freeze()
        streamed_losses(torch.randn(2, 4), head, labels=torch.tensor([0, 1]))

    def test_original_without_labels(self):
        head, student, teacher, labels = batch()
        kd = KDSettings("original")
        with pytest.raises(ValueError, match="labels are None"):
            soft_labels(teacher, head, kd=kd)
        soft = soft_labels(teacher, head, labels=labels, kd=kd)
        with pytest.raises(ValueError, match="labels are None"):
            streamed_losses(student, head, soft=soft, kd=kd)

    @pytest.mark.parametrize(
        "labels, words",
        [
            (torch.tensor([0, C, 1, 1, 1, 1]), f"from 0 to {C}, expected 0 to {C - 1}"),
            (torch.tensor([0, -1, 1, 1, 1, 1]), "from -1 to 1"),
            (torch.tensor([0, 1]), r"labels are torch.int64 \(2,\)"),
            (torch.zeros(N), r"labels are torch.float32"),
        ],
    )
    def test_labels(self, labels, words):
        head, student, *_ = batch()
        with pytest.raises(ValueError, match=words):
            streamed_losses(student, head, labels=labels)

    def test_shapes(self):
        head, student, teacher, labels = batch()
        with pytest.raises(ValueError, match=r"expected \(N, 16\)"):
            streamed_losses(student[:, :3], head, labels=labels)
        with pytest.raises(ValueError, match="soft labels have shape"):
            streamed_losses(student, head, labels=labels, soft=soft_labels(teacher[:2], head))
        with pytest.raises(ValueError, match="expected at least one"):
            streamed_losses(student, head)
        with pytest.raises(ValueError, match="chunk is 0"):
            streamed_losses(student, head, labels=labels, chunk=0)


@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast", "float64"])
def test_label_rows_rank_in_float32_at_least(way):
    """2,000 near classes: bfloat16 products would give other winners."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(way, torch.float32)
    weight = (1 + 0.1 * torch.randn(2000, 32, generator=generator)).to(dtype)
    head = CosineMarginHead.around(weight).train()  # no margin all the same
    features = 1 + 0.1 * torch.randn(300, 32, generator=generator, dtype=torch.float64)
    features = features.to(torch.float64 if way == "float64" else torch.float32)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    scores = 32 * unit @ torch.nn.functional.normalize(weight.double(), dim=1).T
    best = scores.topk(2)
    labels = best.indices[:, 0].clone()
    labels[::2] = best.indices[::2, 1]  # every second one is the runner-up
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        losses, met = label_rows(features, head, labels, chunk=300)
    apart = best.values[:, 0] - best.values[:, 1] > 2e-5  # no tie of float32
    assert torch.equal(met[apart], torch.arange(300)[apart] % 2 == 1) and apart.sum() > 290
    wanted = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
