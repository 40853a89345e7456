"""Two processes (gloo): one student, one batch between them, the files of one run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from landmark_distill.head.distillation import KDSettings
from landmark_distill.model import build_model
from landmark_distill.model_files import load_model
from landmark_distill.objective import Objective
from landmark_distill.teacher import TeacherOutputs
from shared_core.runs import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# Layer norms alone: batch norm would see half a batch in each process.
SWIN = (
    *("--backbone_class", "Swin_tiny", "--depths", "1,1,1,1", "--heads", "1,1,2,2"),
    *("--window", "2", "--drop_path", "0", "--optim", "SGD", "--lr", "0.02"),
)
SMALL = (
    *("--image_size", "32", "--feature_dim", "16", "--batch_size", "10", "--max_epoch", "2"),
    *("--num_workers", "0", "--threads", "1", "--device", "cpu", "--test_share", "0.25"),
    *("--calibration_share", "0.1", "--eval_interval", "2"),
)

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from landmark_distill import session
from landmark_distill.parsing import parse
from shared_core.for_torch.distributed import start

place, rank, words = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
world = start(device="cpu", timeout_s=120, rank=rank, world_size=2,
              init_method=f"file://{place}/meeting")
times, real_works, real_test = {}, session.main_works, session._test

def works(work, world):
    times["waited for"] = times.get("waited for", 0) + 1
    return real_works(work, world)

session.main_works = works

def test(*arguments):
    time.sleep(0.5)
    times.setdefault("tested", time.monotonic())
    return real_test(*arguments)

session._test = test
prepared, real_prepare = [], session.prepare_landmarks
def prepare(*arguments):
    prepared.append(rank)
    return real_prepare(*arguments)
session.prepare_landmarks = prepare
measured = session.run(parse(words, prog="main.py"), world, command="two")
times["returned"] = time.monotonic()
times["measured"], times["prepared"] = sorted(measured), prepared
(place / f"{rank}.json").write_text(json.dumps(times))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory, landmark, landmark_images, file_of):
    """A run by two processes and the same by one; what each process has seen."""
    place = tmp_path_factory.mktemp("two")
    data = landmark_images(place / "images", tuple("abcdef"))
    common = [*SMALL, "--data-path", str(data), "--dataset", "colours"]
    teacher = ("--backbone_class", "Resnet12", "--max_epoch", "1")
    done = landmark(*common, *teacher, "--output", place / "teacher")
    assert done.code == 0, done.err
    student = [
        *common, *SWIN, "--is_distill", "--head_fixed", "--teacher_backbone_class", "Resnet12",
        "--teacher_init_weights", str(place / "teacher" / "max_acc.pth"), "--kd_variant",
        "original", "--kd_weight", "0.1",
    ]  # fmt: skip
    done = landmark(*student, "--output", place / "one")
    assert done.code == 0, done.err
    words = json.dumps([*student, "--output", str(place / "both")])
    paths = f"{REPOSITORY / 'packages'}:{REPOSITORY / 'shared'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(place), str(rank), words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    seen = [json.loads((place / f"{rank}.json").read_text()) for rank in (0, 1)]
    return place, said, seen


def test_gradients_are_averaged_so_two_processes_learn_what_one_does(two):
    place, _, _ = two
    one, both = (
        torch.load(place / name / "last.pth", weights_only=True)["model"]
        for name in ("one", "both")
    )
    first = torch.load(place / "one" / "max_acc.pth", weights_only=True)["model"]
    assert one.keys() == both.keys() == first.keys()
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=2e-5, msg=name)
    rows = [
        [line for line in read_metrics(place / name / "metrics.jsonl") if "split" in line]
        for name in ("one", "both")
    ]
    assert [row["split"] for row in rows[0]] == [row["split"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3), (a, b)
    assert len(rows[0]) == 3  # two epochs and one validation


def test_one_process_writes_and_says(two):
    place, said, _ = two
    record = (place / "both" / "record.txt").read_text().splitlines()
    assert record.count("num_device: 2") == 1
    assert sum(line.startswith("epoch 2 ") for line in record) == 1
    tests = [line for line in record if re.match(r"test acc: coarsegrained:\[", line)]
    assert len(tests) == 1 and record[-1].startswith(("BELOW trained features", tests[0]))
    assert "test acc" in said[0] and "test acc" not in said[1]


def test_nobody_waits_in_a_collective_while_the_images_are_looked_at(two):
    """They are looked at by the main process, and the others wait as long as it takes."""
    _, _, (main, other) = two
    assert main["waited for"] == other["waited for"] == 1
    assert main["prepared"] == [0] and other["prepared"] == []


def test_nobody_waits_for_the_test(two):
    _, _, (main, other) = two
    assert other["returned"] < main["tested"]
    assert "open_set" in main["measured"] and "open_set" not in other["measured"]


@pytest.mark.slow
def test_torchrun_starts_an_ordinary_run(
    landmark, landmark_process, landmark_tiny, landmark_teacher, tmp_path, file_of
):
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
    run = file_of(tmp_path / "two", "record.txt").parent
    model, _ = load_model(run / "max_acc.pth")
    done = landmark(*landmark_tiny(tmp_path / "t", "--test_only", "--init_weights",
                                   run / "max_acc.pth"))  # fmt: skip
    assert done.code == 0, done.err
    found = np.load(file_of(tmp_path / "t", "opensetFeat.npy"))
    assert np.array_equal(found, np.load(run / "opensetFeat.npy"))
    assert all(not name.startswith("module") for name in model.state_dict())


@pytest.mark.parametrize("variant", ["canonical", "original"])
@pytest.mark.parametrize("kd_loss", ["KD", "global_KD"])
def test_shares_of_a_batch_average_to_the_whole_gradient(variant, kd_loss):
    """Two processes have a half each and average gradients; in eval mode, as batch norm differs."""
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
