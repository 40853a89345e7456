"""Killed at any moment and resumed: the same weights, best, record and log as without the stop."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

from landmark_distill.images.landmark_data import prepare_landmarks
from landmark_distill.parsing import parse
from landmark_distill.trainer import Trainer
from shared_core.for_torch.distributed import start


class Stopped(Exception):
    """Stands for a kill inside one process."""


@pytest.fixture
def words(landmark_tiny, landmark_teacher):
    """A distilled run with everything that has a state: momentum, dropout, views, a store."""

    def make(folder, *more):
        return landmark_tiny(
            folder, "--augment", "--is_distill", "--head_fixed", "--momentum", "0.9",
            "--teacher_backbone_class", "Resnet12", "--teacher_init_weights", landmark_teacher,
            "--knowledge", folder / "store", "--max_epoch", "3", "--log_interval", "1",
            "--save_every", "1", "--drop_block_steps", "4", "--resume", "auto", *more,
        )  # fmt: skip

    return make


def folder_of(words):
    """Where a command's run lies."""
    return parse(words, prog="main.py").folder


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same(first, second):
    for name in ("max_acc.pth", "last.pth"):
        a, b = weights_of(first / name), weights_of(second / name)
        assert list(a) == list(b)
        assert all(torch.equal(value, b[key]) for key, value in a.items()), name
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()
    lines = [
        [line for line in (folder / "record.txt").read_text().splitlines() if ": train_acc" in line]
        for folder in (first, second)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    features = [(folder / "opensetFeat.npy").read_bytes() for folder in (first, second)]
    assert features[0] == features[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def finished_run(landmark, words, folder):
    done = landmark(*words(folder))
    assert done.code == 0, done.err
    return folder_of(words(folder))


@pytest.mark.parametrize("when", [1, 2, 4, 7])
def test_stopped_after_any_step(landmark, words, tmp_path, whole, monkeypatch, when):
    """Steps 1 and 2 lie in the first epoch of three steps, 4 in the second, 7 in the last."""
    folder = folder_of(words(tmp_path))
    reference = folder_of(words(whole))
    if not (reference / "result.json").exists():
        finished_run(landmark, words, whole)
    taken, real = [], Trainer.train_step

    def counted(self, batch):
        if len(taken) == when:
            raise Stopped
        taken.append(1)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        with pytest.raises(Stopped):
            landmark(*words(tmp_path))
    assert not (folder / "last.pth").exists()
    finished_run(landmark, words, tmp_path)
    assert "--resume from epoch:" in (folder / "record.txt").read_text()
    assert_same(folder, reference)


def test_killed_by_force(landmark, landmark_process, words, tmp_path, whole):
    reference = folder_of(words(whole))
    if not (reference / "result.json").exists():
        finished_run(landmark, words, whole)
    folder = folder_of(words(tmp_path))
    process = landmark_process(words(tmp_path))
    state, limit = folder / "checkpoint.pth.tar", time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    assert state.exists(), output
    finished_run(landmark, words, tmp_path)
    assert_same(folder, reference)


def test_a_run_that_died_before_its_first_state_starts_again(
    landmark, words, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            landmark(*words(tmp_path))
    folder = finished_run(landmark, words, tmp_path)
    assert (folder / "record.txt").read_text().splitlines()[0] == "path not exist!"


def test_a_worse_epoch_after_a_resume_does_not_replace_the_best(landmark, landmark_tiny, tmp_path):
    """The original saved the best accuracy before it was updated."""
    config = parse(landmark_tiny(tmp_path, "--max_epoch", "2"), prog="main.py")
    folder = tmp_path / "run"
    folder.mkdir()
    data, world = prepare_landmarks(config.data, folder), start(device="cpu")
    first = Trainer(config, folder, data, world)
    scores = iter([(1.0, 0.9)])
    first.evaluate = lambda: next(scores)
    with pytest.raises(StopIteration):
        first.train()
    best = (folder / "max_acc.pth").read_bytes()
    second = Trainer(config, folder, data, world)
    second.evaluate = lambda: (1.0, 0.5)
    result = second.train()
    assert result["max_acc"] == 0.9 and result["best_epoch"] == 1
    assert (folder / "max_acc.pth").read_bytes() == best


def test_a_state_of_another_network_is_refused(landmark, landmark_tiny, tmp_path):
    done = landmark(*landmark_tiny(tmp_path))
    assert done.code == 0, done.err
    folder = folder_of(landmark_tiny(tmp_path, "--feature_dim", "24"))
    (folder / "result.json").unlink()
    done = landmark(*landmark_tiny(tmp_path, "--feature_dim", "24", "--resume"))
    assert done.code == 1 and "feature_dim" in done.err
    config_file = folder / "config.json"
    stored = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**stored, "feature_dim": 24}))
    done = landmark(*landmark_tiny(tmp_path, "--feature_dim", "24", "--resume"))
    assert done.code == 1 and "Traceback" not in done.err and "student" in done.err
