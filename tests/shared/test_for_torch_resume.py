"""A run that was stopped and went on elsewhere ends bit for bit like one that never stopped."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared_core.checkpoints import CheckpointError

torch = pytest.importorskip("torch")
from shared_core.for_torch import checkpoints, seeds  # noqa: E402
from shared_core.for_torch.ema import Ema  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

RUN = '''
"""A small training run with everything that has a state."""
import random, sys
import numpy as np
import torch
from torch import nn
from shared_core.for_torch import checkpoints, seeds
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.precision import Precision


class Order:
    """A sampler with a position."""
    def __init__(self):
        self.epoch, self.position = 0, 0
    def state_dict(self):
        return {"epoch": self.epoch, "position": np.int64(self.position)}
    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]
    def next(self):
        order = np.random.default_rng([7, self.epoch]).permutation(40)
        batch = order[self.position : self.position + 8]
        self.position += 8
        if self.position == 40:
            self.epoch, self.position = self.epoch + 1, 0
        return batch


def build(optimizer, precision):
    seeds.seed_all(3)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )
    if optimizer == "sgd":
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [3, 9], gamma=0.5)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        warm = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
        schedule = torch.optim.lr_scheduler.SequentialLR(opt, [warm, cosine], [4])
    return {
        "model": model,
        "optimizer": opt,
        "scheduler": schedule,
        "ema": Ema(model, decay=0.99),
        "precision": Precision("cpu", precision, init_scale=2.0**10, growth_interval=3),
        "order": Order(),
    }


def train(parts, start, stop, save_at=None, path=None):
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 6)).astype("float32"))
    labels = torch.arange(40) % 3
    best = 1e9
    for step in range(start, stop):
        if step == save_at:
            checkpoints.save_run_state(path, parts, counters={"step": step, "best": 0.125})
        batch = torch.from_numpy(parts["order"].next())
        noise = 0.1 * torch.randn(8, 6) + 0.1 * random.random() + 0.1 * np.random.randn()
        with parts["precision"].autocast():
            logits = parts["model"](images[batch] + noise)
            loss = nn.functional.cross_entropy(logits.float(), labels[batch])
        parts["precision"].backward_step(loss, parts["optimizer"], clip=1.0)
        parts["scheduler"].step()
        parts["ema"].update(parts["model"])
    return {
        "model": dict(parts["model"].state_dict()),
        "ema": parts["ema"].state_dict()["weights"],
        "rest": torch.tensor([random.random(), np.random.rand(), float(torch.rand(1)),
                              parts["scheduler"].get_last_lr()[0], loss.item(),
                              parts["precision"].scaler.get_scale()], dtype=torch.float64),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[1:]:
        state, out, optimizer, precision = job.split(",")
        parts = build(optimizer, precision)
        random.seed(99); torch.manual_seed(99); np.random.seed(99)  # all of it must be put back
        counters = checkpoints.load_run_state(state, parts)
        assert counters == {"step": 7, "best": 0.125}, counters
        torch.save(train(parts, counters["step"], 17), out)
'''


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    state = seeds.capture_rng()
    yield
    seeds.restore_rng(state)
    torch.set_num_threads(before)


@pytest.mark.slow
def test_resume_in_a_new_process_is_bit_identical(tmp_path, one_thread):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    spec = importlib.util.spec_from_file_location("resume_run", script)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    whole, jobs = {}, []
    for optimizer, precision in [("sgd", "fp16"), ("adamw", "fp32")]:
        state, out = tmp_path / f"{optimizer}.pth", tmp_path / f"{optimizer}.out"
        parts = run.build(optimizer, precision)
        whole[out] = run.train(parts, 0, 17, save_at=7, path=state)
        jobs.append(f"{state},{out},{optimizer},{precision}")
    subprocess.run(
        [sys.executable, str(script), *jobs],
        check=True,
        env=os.environ | {"PYTHONPATH": str(SHARED)},
    )
    for out, never_stopped in whole.items():
        resumed = torch.load(out, weights_only=True)
        for name in ("model", "ema"):
            assert list(resumed[name]) == list(never_stopped[name])
            for key, value in never_stopped[name].items():
                assert torch.equal(resumed[name][key], value), (out, name, key)
        assert torch.equal(resumed["rest"], never_stopped["rest"])
        assert not torch.equal(never_stopped["model"]["4.weight"], never_stopped["ema"]["4.weight"])


def model_and_optimizer():
    model = torch.nn.Linear(2, 2)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def test_run_state_is_checked_before_anything_changes(tmp_path):
    path, parts = tmp_path / "s.pth", model_and_optimizer()
    checkpoints.save_run_state(path, parts, counters={"epoch": 1})
    before = parts["model"].weight.clone()
    with pytest.raises(CheckpointError, match="holds the parts model, optimizer, expected model"):
        checkpoints.load_run_state(path, {"model": parts["model"]})
    with pytest.raises(CheckpointError, match="was saved by 1 processes, this one is number 1"):
        checkpoints.load_run_state(path, parts, rank=1)
    other = torch.nn.Linear(3, 2)
    wrong = {"model": other, "optimizer": torch.optim.SGD(other.parameters(), lr=0.1)}
    with pytest.raises(CheckpointError, match=r"\(model\): weights do not fit the model: 1 mis"):
        checkpoints.load_run_state(path, wrong)
    two = [torch.nn.Parameter(torch.zeros(1)) for _ in range(5)]
    wrong = {"model": parts["model"], "optimizer": torch.optim.SGD(two, lr=0.1)}
    with pytest.raises(CheckpointError, match="part optimizer does not fit"):
        checkpoints.load_run_state(path, wrong)
    assert torch.equal(parts["model"].weight, before)


def test_state_that_could_not_be_read_back_is_refused_when_writing(tmp_path):
    class Odd:
        def state_dict(self):
            return {"folder": [Path("x")]}

        def load_state_dict(self, state):
            pass

    with pytest.raises(CheckpointError, match=r"odd.folder\[0\] is a PosixPath, expected tensors"):
        checkpoints.save_run_state(tmp_path / "s.pth", {"odd": Odd()}, counters={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        {"schema": "x"},
        [1],
        {"schema": "smallvision-run/1", "parts": {}},
        {"schema": "smallvision-run/1", "parts": {}, "rng": [{}], "counters": "{}"},
        {"schema": "smallvision-run/1", "parts": {}, "rng": [{"python": 1}], "counters": "{}"},
    ],
)
def test_a_file_that_is_no_run_state(tmp_path, content):
    torch.save(content, tmp_path / "s.pth")
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_run_state(tmp_path / "s.pth", {})
    assert "\n" not in str(error.value)


def test_each_rank_gets_its_own_random_numbers_back(tmp_path, one_thread):
    states, expected = [], []
    for rank in range(2):
        seeds.seed_all(rank)
        states.append(seeds.capture_rng())
        expected.append((random.random(), np.random.rand(), torch.rand(2).tolist()))
    checkpoints.save_run_state(tmp_path / "s.pth", {}, counters={}, rng=states)
    for rank in (1, 0):
        checkpoints.load_run_state(tmp_path / "s.pth", {}, rank=rank)
        assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected[rank]


def test_seed_all_repeats_and_refuses(one_thread):
    seeds.seed_all(5)
    first = (random.random(), np.random.rand(), float(torch.rand(1)))
    seeds.seed_all(5)
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == first
    with pytest.raises(ValueError, match="seed -1"):
        seeds.seed_all(-1)


def test_deterministic_switch(one_thread):
    try:
        seeds.seed_all(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_ema_follows_its_formula():
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    truth = np.zeros(2)
    for step in range(1, 12):
        value = np.array([step, -step], dtype=np.float64)
        model.running_mean.copy_(torch.from_numpy(value))
        model.num_batches_tracked.fill_(step)
        ema.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        truth = decay * truth + (1 - decay) * value
    np.testing.assert_allclose(ema.weights["running_mean"], truth, rtol=1e-6)
    assert ema.weights["num_batches_tracked"] == 11
    assert ema.decay_at(1) == pytest.approx(2 / 11)
    assert Ema(model, decay=0.5, warmup=False).decay_at(1) == 0.5


def test_ema_warm_up_leaves_the_start_behind():
    """A constant 0.9999 keeps 90 % of the start after 1000 steps; the warm-up keeps none."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        warm, cold = Ema(model, decay=0.9999), Ema(model, decay=0.9999, warmup=False)
        model.weight.fill_(0.0)
    for _ in range(1000):
        warm.update(model)
        cold.update(model)
    assert float(cold.weights["weight"]) == pytest.approx(0.9999**1000, rel=1e-4)
    assert float(warm.weights["weight"]) < 1e-6


def test_ema_applied_gives_the_weights_back():
    model = torch.nn.Linear(2, 2)
    ema, own = Ema(model), model.weight.clone()
    with torch.no_grad():
        ema.weights["weight"].fill_(3.0)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model) as averaged:
        assert torch.equal(averaged.weight, torch.full((2, 2), 3.0))
        raise RuntimeError("inside")
    assert torch.equal(model.weight, own)


def test_ema_refuses():
    with pytest.raises(ValueError, match="decay is 1.0"):
        Ema(torch.nn.Linear(1, 1), decay=1.0)
    state = Ema(torch.nn.Linear(1, 1)).state_dict()
    with pytest.raises(CheckpointError, match="stored decay is 0.999, expected 0.9"):
        Ema(torch.nn.Linear(1, 1), decay=0.9).load_state_dict(state)
    with pytest.raises(CheckpointError, match="EMA: weights do not fit"):
        Ema(torch.nn.Linear(2, 1)).load_state_dict(state)
