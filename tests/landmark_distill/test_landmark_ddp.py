"""Two processes by torchrun (gloo): one student, one batch between them, the files of one run."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import torch

from landmark_distill.model import build_model
from landmark_distill.model_files import load_model
from landmark_distill.objective import Objective
from landmark_distill.teacher import TeacherOutputs
from shared_core.runs import read_metrics

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_two_processes_train_one_student(
    landmark, landmark_process, landmark_tiny, landmark_teacher, tmp_path, file_of
):
    # Without augmentation or dropout the batch's gradient is the same, but for batch norm.
    words = landmark_tiny(
        tmp_path / "two", "--is_distill", "--head_fixed", "--teacher_backbone_class", "Resnet12",
        "--teacher_init_weights", landmark_teacher, "--max_epoch", "1", "--multi_gpu",
    )  # fmt: skip
    process = landmark_process(words, *TORCHRUN)
    try:
        output = process.communicate(timeout=150)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output
    record = file_of(tmp_path / "two", "record.txt").read_text().splitlines()
    assert record.count("num_device: 2") == 1  # one process writes
    assert sum(line.startswith("epoch 1 ") for line in record) == 1
    assert re.match(r"test acc: coarsegrained:\[", record[-1])
    run = file_of(tmp_path / "two", "record.txt").parent
    assert np.isfinite(np.load(run / "opensetFeat.npy")).all()
    # The file of two processes is an ordinary one.
    words = [word for word in words if word != "--multi_gpu"]
    model, _ = load_model(run / "max_acc.pth")
    done = landmark(*landmark_tiny(tmp_path / "t", "--test_only", "--init_weights",
                                   run / "max_acc.pth"))  # fmt: skip
    assert done.code == 0, done.err
    found = np.load(file_of(tmp_path / "t", "opensetFeat.npy"))
    assert np.array_equal(found, np.load(run / "opensetFeat.npy"))
    values = [line for line in read_metrics(run / "metrics.jsonl") if line["split"] == "train"]
    assert len(values) == 1 and np.isfinite(values[0]["loss"])
    assert all(not name.startswith("module") for name in model.state_dict())


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("kd_loss", ["KD", "global_KD"])
def test_shares_of_a_batch_average_to_the_whole_gradient(variant, kd_loss):
    """Two processes have a half each and average gradients; in eval mode, as batch norm differs."""
    from landmark_distill.head.distillation import KDSettings

    torch.manual_seed(0)
    student = build_model("Resnet12", num_classes=7, feature_dim=16).double().eval()
    head = build_model("Resnet12", num_classes=7, feature_dim=16).head.double().eval()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([0, 3, 6, 1])
    features = torch.randn(4, 16, dtype=torch.float64)

    def gradient(processes: int, rows: slice) -> torch.Tensor:
        student.zero_grad()
        objective = Objective(
            student, kd_loss=kd_loss, teacher_head=head, kd=KDSettings(variant, 4.0),
            processes=processes,
        ).eval()  # fmt: skip
        objective(images[rows], labels[rows], TeacherOutputs(features=features[rows]))[
            "loss"
        ].backward()
        return student.encoder.stem[0].weight.grad.clone()

    whole = gradient(1, slice(0, 4))
    parts = (gradient(2, slice(0, 2)) + gradient(2, slice(2, 4))) / 2
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_batch_must_be_a_multiple_of_the_processes(landmark, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = landmark("--batch_size", "16", "--save_dir", tmp_path)
    assert done.code == 2 and "16 for 3 processes" in done.err
