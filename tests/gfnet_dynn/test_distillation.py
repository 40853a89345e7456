"""Distillation losses against loops in NumPy float64, and a teacher that stays as it is."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.settings import Distillation
from gfnet_dynn.train.distillation import (
    ClassCentres,
    DistillationTask,
    Projector,
    block_outputs,
    class_centres,
    freeze_teacher,
    half_spectrum,
    half_spectrum_weights,
    matched_blocks,
    nd_loss,
    spectrum_loss,
)

GRIDS = [(4, 4), (5, 5), (3, 8), (8, 3), (1, 1), (2, 1)]


def make(dim, depth=3, classes=4, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": classes}
    return GFNet(**sizes, embed_dim=dim, depth=depth, **options)


def data(n=24, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = torch.tensor(np.arange(n) % classes)
    images = torch.tensor(rng.normal(size=(n, 3, 16, 16)), dtype=torch.float32)
    return images + labels[:, None, None, None] / 2, labels


# --- class centres


def test_centres_are_the_group_means_whatever_the_batches():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(50, 6)), rng.integers(0, 4, 50)
    for size in (50, 7, 1):
        centres = ClassCentres(4, 6)
        for i in range(0, 50, size):
            centres.update(
                torch.tensor(embeddings[i : i + size]), torch.tensor(labels[i : i + size])
            )
        want = np.stack([embeddings[labels == c].mean(axis=0) for c in range(4)])
        np.testing.assert_allclose(centres.result(), want, rtol=1e-6, atol=1e-7)


def test_a_class_without_samples_has_no_centre():
    centres = ClassCentres(3, 2)
    centres.update(torch.ones(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="no samples of class 1"):
        centres.result()
    with pytest.raises(ValueError, match="no batches"):
        class_centres(make(8), [], num_classes=3)


def test_centres_of_a_teacher_are_taken_in_eval_mode():
    teacher = make(8, drop_path_rate=0.9).train()
    images, labels = data()
    centres = class_centres(teacher, [(images[:10], labels[:10]), (images[10:], labels[10:])],
                            num_classes=4)  # fmt: skip
    assert teacher.training
    with torch.no_grad():
        embeddings = teacher.eval().embed(images)
    want = torch.stack([embeddings[labels == c].mean(dim=0) for c in range(4)])
    np.testing.assert_allclose(centres, want, rtol=1e-5, atol=1e-6)


# --- norm and direction


def nd_reference(student, teacher, labels, centres):
    total = 0.0
    for f, t, y in zip(student, teacher, labels, strict=True):
        c = centres[y] / np.linalg.norm(centres[y])
        total += 1 - f @ c / max(np.linalg.norm(f), np.linalg.norm(t))
    return total / len(student)


def test_nd_loss_equals_the_loop():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 30, 6))
    student *= rng.uniform(0.2, 4, size=(30, 1))
    centres, labels = rng.normal(size=(4, 6)), rng.integers(0, 4, 30)
    got = nd_loss(*(torch.tensor(v) for v in (student, teacher, labels, centres)))
    assert got.item() == pytest.approx(nd_reference(student, teacher, labels, centres), rel=1e-6)
    shares = F.one_hot(torch.tensor(labels), 4)
    soft = nd_loss(torch.tensor(student), torch.tensor(teacher), shares, torch.tensor(centres))
    assert soft.item() == pytest.approx(got.item(), rel=1e-6)


@pytest.mark.parametrize(("scale", "want"), [(1.0, 0.0), (3.0, 0.0), (0.25, 0.75), (-1.0, 2.0)])
def test_nd_is_zero_only_for_aligned_and_long_enough(scale, want):
    """Aligned to the centre with ``scale`` times the teacher's norm."""
    rng = np.random.default_rng(1)
    centres = torch.tensor(rng.normal(size=(4, 6)))
    labels = torch.tensor([0, 1, 2, 3])
    teacher = torch.tensor(rng.normal(size=(4, 6)))
    student = F.normalize(centres, dim=1) * teacher.norm(dim=1, keepdim=True) * scale
    got = nd_loss(student, teacher, labels, centres).item()
    assert got == pytest.approx(want, abs=1e-6)
    turned = nd_loss(student.roll(1, dims=1), teacher, labels, centres).item()
    assert turned > 1e-3


def test_nd_is_finite_for_embeddings_of_zeros():
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = nd_loss(zero, torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(2, 3))
    loss.backward()
    assert loss.item() == 1.0 and torch.isfinite(zero.grad).all()


# --- spectrum


@pytest.mark.parametrize("grid", GRIDS)
def test_parseval(grid):
    tokens = torch.tensor(np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], 3)))
    spectrum = half_spectrum(tokens, grid)
    energy = (half_spectrum_weights(grid[1])[:, None] * spectrum.abs() ** 2).sum()
    assert energy.item() == pytest.approx((tokens**2).sum().item(), rel=1e-5)


def full_spectrum_reference(student, teacher, grid):
    """Over the whole spectrum, without weights."""
    shape = (len(student), *grid, student.shape[2])
    s = np.fft.fft2(student.reshape(shape), axes=(1, 2), norm="ortho")
    t = np.fft.fft2(teacher.reshape(shape), axes=(1, 2), norm="ortho")
    return np.abs(np.abs(s) - np.abs(t)).sum() / np.abs(t).sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_spectrum_loss_equals_the_full_spectrum(grid):
    student, teacher = np.random.default_rng(2).normal(size=(2, 2, grid[0] * grid[1], 3))
    got = spectrum_loss(torch.tensor(student), torch.tensor(teacher), grid).item()
    assert got == pytest.approx(full_spectrum_reference(student, teacher, grid), rel=1e-4)


def test_spectrum_loss_limits():
    tokens = torch.tensor(np.random.default_rng(3).normal(size=(2, 16, 3)))
    assert spectrum_loss(tokens, tokens, (4, 4)).item() == pytest.approx(0, abs=1e-6)
    assert spectrum_loss(0 * tokens, tokens, (4, 4)).item() == pytest.approx(1)
    assert spectrum_loss(-tokens, tokens, (4, 4)).item() == pytest.approx(0, abs=1e-6)
    # a cyclic shift of the picture changes phases only
    shifted = tokens.unflatten(1, (4, 4)).roll((1, 2), dims=(1, 2)).flatten(1, 2)
    assert spectrum_loss(shifted, tokens, (4, 4)).item() == pytest.approx(0, abs=1e-6)


def test_spectrum_gradient_reaches_the_student_only():
    student = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    spectrum_loss(student, teacher, (4, 4)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    zeros = torch.zeros(2, 16, 3, requires_grad=True)
    spectrum_loss(zeros, teacher, (4, 4)).backward()
    assert torch.isfinite(zeros.grad).all()


def test_spectrum_refusals():
    tokens = torch.ones(1, 6, 2)
    with pytest.raises(ValueError, match=r"expected \(N, 2\*4, C\)"):
        half_spectrum(tokens, (2, 4))
    with pytest.raises(ValueError, match="expected the teacher's"):
        spectrum_loss(tokens, torch.ones(1, 6, 3), (2, 3))
    with pytest.raises(ValueError, match="width is 0"):
        half_spectrum_weights(0)


# --- all of it


def test_projector_is_batchnorm_dropout_linear():
    projector = Projector(4, 6)
    assert [type(m) for m in projector] == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert projector[1].p == 0.5 and projector[2].weight.shape == (6, 4)


def test_matched_blocks():
    assert matched_blocks(12, 12, 4) == [(2, 2), (5, 5), (8, 8), (11, 11)]
    assert matched_blocks(12, 19, 2) == [(5, 8), (11, 18)]
    assert matched_blocks(3, 6, 3) == [(0, 1), (1, 3), (2, 5)]
    with pytest.raises(ValueError, match="4 matched blocks"):
        matched_blocks(3, 12, 4)


def test_block_outputs_are_the_tokens_after_the_blocks():
    model = make(8).eval()
    images, _ = data(4)
    with torch.no_grad():
        want = model.block_tokens(images, [2, 0])
        with block_outputs(model, [2, 0]) as found:
            model(images)
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)
        model(images * 2)  # the hooks are gone
    assert torch.equal(found[0], want[0])


def weights(kd=1.0, nd=2.0, spectrum=0.0, temperature=4.0, warmup=1, label=1.0):
    return Distillation(label, kd, temperature, warmup, nd, spectrum, "live", False)


def task_of(student, teacher, settings, **options):
    """With the teacher's class centres, and nothing random in it."""
    images, labels = data()
    centres = class_centres(teacher, [(images, labels)], num_classes=4)
    return DistillationTask(
        student, freeze_teacher(teacher), settings, **{"centres": centres, **options}
    )


def test_total_is_the_weighted_sum_with_the_ramp():
    teacher, student = make(12, depth=6, seed=1), make(8, depth=3, seed=2)
    with torch.no_grad():
        for network in (teacher, student):
            network.head.weight.mul_(40)  # answers that differ
    settings = weights(kd=3.5, nd=2.0, spectrum=0.7, warmup=20)
    pairs = [(0, 1), (2, 5)]
    task = task_of(student, teacher, settings, pairs=pairs, smoothing=0.1).eval()
    images, labels = data(6)
    parts = task(images, labels, 5)
    with torch.no_grad():
        embedding, logits = student(images, embed=True)
        seen, taught = teacher(images, embed=True)
        tokens = student.block_tokens(images, [0, 2])
        theirs = teacher.block_tokens(images, [1, 5])
        projected = task.projector(embedding).double().numpy()
        mapped = [p(s).numpy() for p, s in zip(task.block_projectors, tokens, strict=True)]
    z, t = logits.double() / 4, taught.double() / 4
    kd = 16 * (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).sum(1).mean()
    assert parts["kd"].item() == pytest.approx(kd.item(), rel=1e-4)
    log_p = logits.double().log_softmax(1)
    ce = -(0.9 * log_p[range(6), labels] + 0.1 * log_p.mean(1)).mean()
    assert parts["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    nd = nd_reference(projected, seen.double().numpy(), labels, task.centres.numpy())
    assert parts["nd"].item() == pytest.approx(nd, rel=1e-5)
    spec = np.mean(
        [full_spectrum_reference(m, t.numpy(), (4, 4)) for m, t in zip(mapped, theirs, strict=True)]
    )
    assert parts["spectrum"].item() == pytest.approx(spec, rel=1e-4)
    want = parts["ce"] + 3.5 * (5 / 20) * parts["kd"] + 2 * parts["nd"] + 0.7 * parts["spectrum"]
    assert parts["loss"].item() == pytest.approx(want.item(), rel=1e-6)


def test_ramp():
    ramp = task_of(make(8), make(12), weights(warmup=20)).ramp
    assert [ramp(e) for e in (1, 10, 20, 200)] == [0.05, 0.5, 1.0, 1.0]
    assert task_of(make(8), make(12), weights(warmup=1)).ramp(1) == 1.0


def test_stored_answers_teach_as_the_teacher_itself():
    teacher, student = make(12, seed=1), make(8, seed=2)
    images, labels = data(6)
    with torch.no_grad():
        answers = freeze_teacher(teacher)(images) * 40
        teacher.head.weight.mul_(40), teacher.head.bias.mul_(40)
    settings = weights(nd=0, label=0.25)
    live = task_of(student, teacher, settings)(images, labels, 1)
    stored = DistillationTask(student, None, settings)(images, labels, 1, answers)
    for name in ("loss", "ce", "kd"):
        assert stored[name].item() == pytest.approx(live[name].item(), rel=1e-5)
    assert live["loss"].item() == pytest.approx((0.25 * live["ce"] + live["kd"]).item())
    with pytest.raises(ValueError, match="stored answers hold no tokens"):
        DistillationTask(student, None, weights())


def test_without_weights_it_is_plain_cross_entropy():
    student = make(8).eval()
    task = task_of(student, make(12), weights(kd=0, nd=0))
    assert len(list(task.parameters())) == len(list(student.parameters())) and task.centres is None
    images, labels = data(3)
    losses = task(images, labels, 1)
    assert set(losses) == {"loss", "ce"}
    assert losses["loss"].item() == pytest.approx(F.cross_entropy(student(images), labels).item())


def test_a_student_learns_and_its_teacher_and_file_stay_plain():
    teacher, student = make(12, depth=6, seed=1), make(8, depth=3, seed=2)
    names = set(student.state_dict())
    task = task_of(student, teacher, weights(spectrum=1.0), pairs=matched_blocks(3, 6, 3))
    images, labels = data()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert not any("teacher" in name for name in task.state_dict())  # no part of what is saved
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        task.train()
        losses = task(images, labels, 1)
        assert not losses["loss"].isnan()
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    for name in ("loss", "ce", "nd", "spectrum"):
        assert history[-1][name] < history[0][name], name
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert set(student.state_dict()) == names
    make(8, depth=3).load_state_dict(student.state_dict())  # strict: a plain student
    assert all(p.grad is not None for p in task.parameters())


def test_soft_targets_of_mixup_are_taken():
    images, labels = data()
    task = task_of(make(8, seed=2), make(12, seed=1), weights()).eval()
    hard = task(images, labels, 1)
    soft = task(images, F.one_hot(labels, 4).float(), 1)
    for name in hard:
        assert soft[name].item() == pytest.approx(hard[name].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (weights(), {"centres": None}, "class centres have shape None"),
        (weights(), {"centres": torch.ones(4, 8)}, r"shape \(4, 8\); expected \(K, 12\)"),
        (weights(spectrum=1.0), {}, "without matched blocks"),
    ],
)
def test_refusals(settings, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(make(8), make(12), settings, **options)
    with pytest.raises(ValueError, match="teacher is in training mode"):
        DistillationTask(make(8), make(12).train(), settings)
