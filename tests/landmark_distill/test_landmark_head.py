"""The cosine head, its file, and the distillation losses from whole logits."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from landmark_distill.head.cosine_head import CosineMarginHead
from landmark_distill.head.distillation import (
    KDSettings,
    feature_cosine,
    full_losses,
    global_kd,
    kd_from_logits,
)
from landmark_distill.model_files import read_head

STUDENT = torch.tensor([[1.0, 2, 3, 4], [2, 0, 1, 0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 1, 0, 3], [1, 1, 1, 1]], dtype=torch.float64)


def head_of(rows: list[list[float]], **settings: float) -> CosineMarginHead:
    head = CosineMarginHead(len(rows), len(rows[0]), **settings)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(rows))
    return head


def test_hand_counted_logits():
    head = head_of([[1, 0, 0], [0, 2, 0], [0, 0, 5]])
    x, label = torch.tensor([[3.0, 4, 0]]), torch.tensor([1])
    torch.testing.assert_close(head(x, label), torch.tensor([[19.2, 22.4, 0]]))
    torch.testing.assert_close(head(x), torch.tensor([[19.2, 25.6, 0]]))
    torch.testing.assert_close(head.eval()(x, label), torch.tensor([[19.2, 25.6, 0]]))


def test_lengths_do_not_count_and_zero_is_no_trouble():
    torch.manual_seed(0)
    head = CosineMarginHead(6, 4)
    x = torch.randn(3, 4)
    torch.testing.assert_close(head(x), head(7 * x))
    assert torch.equal(head(torch.zeros(1, 4)), torch.zeros(1, 6))


def test_row_scale_follows_the_weight():
    torch.manual_seed(0)
    head = CosineMarginHead(20_000, 8).freeze()
    expected = 1 / np.linalg.norm(head.weight.double().numpy(), axis=1)
    np.testing.assert_allclose(head.row_scale().numpy(), expected, rtol=1e-6)
    assert head.row_scale() is head.row_scale()
    with torch.no_grad():
        head.weight.mul_(2)
    np.testing.assert_allclose(head.row_scale().numpy(), expected / 2, rtol=1e-6)
    with torch.no_grad():
        head.weight /= head.weight.norm(dim=1, keepdim=True)
    assert head.row_scale() is None
    with torch.no_grad():
        head.weight[3] *= 1.001
    assert head.row_scale() is not None


def test_weight_that_is_no_matrix_of_floats_is_refused():
    with pytest.raises(ValueError, match="expected floats"):
        CosineMarginHead.around(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected floats"):
        CosineMarginHead.around(torch.zeros(3))


class TestLosses:
    """Numbers of a table made by hand (float64)."""

    def test_original(self):
        kd = KDSettings("original", 4.0)
        assert kd_from_logits(STUDENT, TEACHER, kd).item() == pytest.approx(0.495152, abs=1e-6)

    def test_canonical(self):
        kd = KDSettings("canonical", 4.0)
        assert kd_from_logits(STUDENT, TEACHER, kd).item() == pytest.approx(0.343633, abs=1e-6)

    def test_global_kd(self):
        assert global_kd(STUDENT, TEACHER, variant="original").item() == 15
        assert global_kd(STUDENT, TEACHER).item() == 7.5

    def test_feature_cosine(self):
        dots = [2 + 12, 2 + 0 + 1 + 0]
        norms = [np.sqrt(30 * 10), np.sqrt(5 * 4)]
        expected = np.mean([1 - d / n for d, n in zip(dots, norms, strict=True)])
        assert feature_cosine(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-6)
        assert feature_cosine(STUDENT, 3 * STUDENT).item() == pytest.approx(0, abs=1e-6)

    def test_teacher_gets_no_gradient(self):
        teacher = TEACHER.clone().requires_grad_()
        student = STUDENT.clone().requires_grad_()
        for loss in (
            kd_from_logits(student, teacher, KDSettings()),
            global_kd(student, teacher),
            feature_cosine(student, teacher),
        ):
            loss.backward()
        assert teacher.grad is None and student.grad is not None

    def test_errors(self):
        with pytest.raises(ValueError, match="kd_variant is 'paper'"):
            KDSettings("paper")
        with pytest.raises(ValueError, match="kd_temperature is 0"):
            KDSettings(temperature=0)
        with pytest.raises(ValueError, match="kd_variant is 'sum'"):
            global_kd(STUDENT, TEACHER, variant="sum")
        with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 3\)"):
            feature_cosine(STUDENT, TEACHER[:, :3])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("training", [True, False])
def test_full_losses_are_those_of_numpy(variant, training):
    generator = np.random.default_rng(0)
    weight, x, t = (generator.normal(size=size) for size in ((9, 5), (4, 5), (4, 5)))
    y, s, m, temperature = np.array([2, 8, 0, 2]), 11.0, 0.3, 3.0
    head = CosineMarginHead.around(torch.from_numpy(weight), scale=s, margin=m).train(training)
    kd = KDSettings(variant, temperature)
    losses = full_losses(
        torch.from_numpy(x), head, labels=torch.from_numpy(y),
        teacher_features=torch.from_numpy(t), kd=kd,
    )  # fmt: skip

    def scores(f):
        f, w = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (f, weight))
        return s * f @ w.T

    label = s * m * np.eye(9)[y]
    plain, teacher = scores(x), scores(t)
    ce = -log_softmax(plain - label * training)[np.arange(4), y].mean()
    if variant == "original":
        p, q = log_softmax(teacher - label), log_softmax((plain - label) / temperature)
        expected = (np.exp(p) * (p - q)).sum()
    else:
        p, q = log_softmax(teacher / temperature), log_softmax(plain / temperature)
        expected = (np.exp(p) * (p - q)).sum(1).mean() * temperature**2
    assert losses.ce.item() == pytest.approx(ce, rel=1e-12)
    assert losses.kd.item() == pytest.approx(expected, rel=1e-12)
    assert losses.correct.tolist() == (plain.argmax(1) == y).tolist()


def mapped(path, **more):
    return read_head(path, **{"mapped": True, "dtype": None, "scale": 20.0, "margin": 0.25, **more})


class TestFile:
    """A head in a model file: mapped, shared, never written to, never executed."""

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("under", [(), ("model_state",), ("params",), ("model",)])
    def test_torch_files(self, tmp_path, keep, under):
        weight = torch.randn(6, 4)
        state = {"encoder.bias": torch.zeros(2), "encoder.head.weight": weight}
        for key in under:
            state = {key: state}
        torch.save(state, tmp_path / "teacher.pth")
        head = mapped(tmp_path / "teacher.pth", mapped=keep)
        assert torch.equal(head.weight, weight) and head.frozen
        assert (head.scale, head.margin) == (20.0, 0.25)
        half = mapped(tmp_path / "teacher.pth", mapped=False, dtype=torch.bfloat16)
        assert torch.equal(half.weight, weight.bfloat16())

    def test_any_safetensors_with_a_head(self, tmp_path):
        from safetensors.torch import save_file

        weight = torch.randn(7, 3)
        tensors = {"encoder.norm.bias": torch.zeros(5), "encoder.head.weight": weight}
        save_file(tensors, tmp_path / "model.safetensors")
        assert torch.equal(mapped(tmp_path / "model.safetensors").weight, weight)

    def test_file_is_never_written_to(self, tmp_path):
        from safetensors.torch import save_file

        weight = {"head.weight": torch.ones(3, 2)}
        torch.save(weight, tmp_path / "head.pth")
        save_file(weight, tmp_path / "head.safetensors")
        for name in ("head.pth", "head.safetensors"):
            before = (tmp_path / name).read_bytes()
            mapped(tmp_path / name).weight.data.zero_()
            assert (tmp_path / name).read_bytes() == before

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_a_mapped_head_is_not_read_before_it_is_used(self, tmp_path):
        path = tmp_path / "head.pth"
        torch.save({"head.weight": CosineMarginHead(60_000, 256).weight.data}, path)  # 58 MiB

        def held(kind):
            text = Path("/proc/self/status").read_text().split(kind + ":")[1]
            return int(text.split()[0]) / 1024

        before = held("VmRSS")
        head = mapped(path)
        assert held("VmRSS") - before < 5  # MiB
        own = held("RssAnon")
        head.row_scale()
        assert held("RssAnon") - own < 30  # parts of 1 MiB, never the whole of 58

    def test_errors_name_the_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
            mapped(tmp_path / "none.pth")
        (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
        (tmp_path / "bad.pth").write_bytes(b"nothing")
        header = {"head.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        lie = struct.pack("<Q", len(text)) + text + bytes(4)
        (tmp_path / "lie.safetensors").write_bytes(lie)
        torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
        torch.save({"head.weight": torch.zeros(30, 20)}, tmp_path / "cut.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-80])
        for name in ("bad.safetensors", "bad.pth", "lie.safetensors", "other.pth", "cut.pth"):
            with pytest.raises(ValueError, match=name) as error:
                mapped(tmp_path / name)
            assert "\n" not in str(error.value)

    def test_nothing_in_a_checkpoint_is_executed(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        torch.save({"head.weight": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(ValueError, match="evil.pth"):
            mapped(tmp_path / "evil.pth")
        assert not (tmp_path / "executed").exists()
