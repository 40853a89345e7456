"""The cosine head, its file, and the distillation losses from whole logits."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from landmark_distill.cosine_head import CosineMarginHead
from landmark_distill.head_file import head_from_file, save_head
from landmark_distill.head_kd import (
    KDSettings,
    feature_cosine,
    full_losses,
    global_kd,
    kd_from_logits,
)

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


class TestFile:
    """A head on disk: written with unit rows, mapped, shared, never executed."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_way_through_a_file(self, tmp_path, dtype):
        torch.manual_seed(0)
        head = CosineMarginHead(9001, 16, scale=20.0, margin=0.25)
        save_head(tmp_path / "head.safetensors", head, dtype=dtype)
        again = head_from_file(tmp_path / "head.safetensors")
        assert (again.scale, again.margin, again.frozen) == (20.0, 0.25, True)
        assert again.weight.dtype == dtype and again.weight.shape == (9001, 16)
        unit = head.weight.detach() / head.weight.detach().norm(dim=1, keepdim=True)
        assert torch.equal(again.weight, unit.to(dtype)) or dtype == torch.float32
        torch.testing.assert_close(again.weight.float(), unit, rtol=0.01, atol=1e-6)
        if dtype == torch.float32:
            assert again.row_scale() is None

    def test_safetensors_reads_it_too(self, tmp_path):
        from safetensors.torch import load_file

        head = CosineMarginHead(10, 4)
        save_head(tmp_path / "head.safetensors", head)
        found = load_file(tmp_path / "head.safetensors")["head.weight"]
        assert torch.equal(found, head_from_file(tmp_path / "head.safetensors").weight)

    def test_any_safetensors_with_a_head(self, tmp_path):
        from safetensors.torch import save_file

        weight = torch.randn(7, 3)
        tensors = {"encoder.norm.bias": torch.zeros(5), "encoder.head.weight": weight}
        save_file(tensors, tmp_path / "model.safetensors")
        assert torch.equal(head_from_file(tmp_path / "model.safetensors").weight, weight)

    @pytest.mark.parametrize("mmap", [True, False])
    def test_npy_and_checkpoints(self, tmp_path, mmap):
        weight = torch.randn(6, 4)
        np.save(tmp_path / "head.npy", weight.numpy())
        torch.save({"model_state": {"encoder.head.weight": weight}}, tmp_path / "teacher.pth")
        torch.save({"head.weight": weight}, tmp_path / "plain.pth")
        for name in ("head.npy", "teacher.pth", "plain.pth"):
            head = head_from_file(tmp_path / name, mmap=mmap)
            assert torch.equal(head.weight, weight) and head.scale == 32

    def test_file_is_never_written_to(self, tmp_path):
        np.save(tmp_path / "head.npy", np.ones((3, 2), np.float32))
        save_head(tmp_path / "head.safetensors", CosineMarginHead(3, 2))
        for name in ("head.npy", "head.safetensors"):
            before = (tmp_path / name).read_bytes()
            head = head_from_file(tmp_path / name)
            head.weight.data.zero_()
            assert (tmp_path / name).read_bytes() == before

    @pytest.mark.slow
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_a_mapped_head_is_not_read_before_it_is_used(self, tmp_path):
        path = tmp_path / "head.safetensors"
        save_head(path, CosineMarginHead(60_000, 256))  # 58 MiB
        code = (
            "import sys, torch; from landmark_distill.head_file import head_from_file\n"
            "def now(kind):\n"
            "    text = open('/proc/self/status').read().split(kind + ':')[1]\n"
            "    return int(text.split()[0]) / 1024\n"
            "before = now('VmRSS'); head = head_from_file(sys.argv[1]); after = now('VmRSS')\n"
            "own = now('RssAnon'); head.row_scale(); print(after - before, now('RssAnon') - own)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        mapped, used = map(float, done.stdout.split())
        assert mapped < 5 and used < 45  # MiB: parts of 1 MiB, never the whole of 58

    def test_scale_and_margin_can_be_given(self, tmp_path):
        save_head(tmp_path / "head.safetensors", CosineMarginHead(3, 2))
        head = head_from_file(tmp_path / "head.safetensors", scale=5.0, margin=0.0)
        assert (head.scale, head.margin) == (5.0, 0.0)

    def test_errors_name_the_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.npy: no such file"):
            head_from_file(tmp_path / "none.npy")
        (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
        (tmp_path / "bad.pth").write_bytes(b"nothing")
        (tmp_path / "bad.npy").write_bytes(b"nothing")
        for name in ("bad.safetensors", "bad.pth", "bad.npy"):
            with pytest.raises(ValueError, match=name) as error:
                head_from_file(tmp_path / name)
            assert "\n" not in str(error.value)
        torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="holds no head"):
            head_from_file(tmp_path / "other.pth")
        with pytest.raises(ValueError, match="expected \\*.safetensors"):
            save_head(tmp_path / "head.npy", CosineMarginHead(3, 2))

    def test_a_cut_file_is_refused(self, tmp_path):
        path = tmp_path / "head.safetensors"
        save_head(path, CosineMarginHead(30, 20))
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="whole"):
            head_from_file(path)

    def test_a_lying_header_is_refused(self, tmp_path):
        header = {"head.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        path = tmp_path / "head.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(ValueError, match="whole"):
            head_from_file(path)

    def test_nothing_in_a_checkpoint_is_executed(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        torch.save({"head.weight": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(ValueError, match="evil.pth"):
            head_from_file(tmp_path / "evil.pth")
        assert not (tmp_path / "executed").exists()
