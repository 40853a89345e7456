"""Two Paddle processes on a CPU compute what one computes on the whole batch, and write once."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
from paddle import nn  # noqa: E402

from shared_core.for_paddle import distributed  # noqa: E402
from shared_core.for_paddle.data import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

SCRIPT = """
import pickle, sys
from pathlib import Path
import numpy as np
import paddle
from paddle import nn
from shared_core.datasets import BatchLoader, EpochOrder, ImageSet
from shared_core.datasets.views.augment import EvalView
from shared_core.for_paddle import distributed as d
from shared_core.for_paddle.accuracy import answers_of
from shared_core.for_paddle.data import Normalizer, PaddleLoader

out = Path(sys.argv[1])
world = d.start(device="cpu")
assert world.world_size == 2
model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
start = np.load(out / "start.npz")
model.set_state_dict({k: start[k] for k in start if k != "judged"})
wrapped = d.wrap(model, world)
assert d.unwrap(wrapped) is model
optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
data = np.random.default_rng(1)
losses = []
for step in range(5):
    x = data.normal(size=(8, 5)).astype("float32")[world.rank :: 2]
    y = data.integers(3, size=8)[world.rank :: 2]
    loss = nn.functional.cross_entropy(wrapped(paddle.to_tensor(x)), paddle.to_tensor(y))
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    losses.append(d.all_mean(float(loss), world))
result = {"weights": {k: v.numpy() for k, v in model.state_dict().items()}, "losses": losses}
total = paddle.arange(11, dtype="float32").unsqueeze(1) * paddle.to_tensor([1.0, -2.0])
mine = paddle.to_tensor([0, 2, 4, 6, 8, 10] if world.rank == 0 else [1, 3, 5, 7, 9, 10])
values = paddle.index_select(total, mine)
result["ordered"] = d.gather_samples(values, mine, world, total=11).numpy()
share = total[:7] if world.rank == 0 else total[:0]
result["uneven"] = d.gather_uneven(share, world).numpy()
result["weighted"] = d.all_mean(float(world.rank), world, weight=1.0 + 2 * world.rank)

images = np.random.default_rng(2).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
source = BatchLoader(
    ImageSet(None, np.arange(7) % 3, source=images), view=EvalView(4, resize_ratio=None),
    batch_size=2, threads=0,
    order=EpochOrder(7, shuffle=False, rank=world.rank, world_size=2, uneven="keep"),
)
judged = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
judged[1].weight.set_value(paddle.to_tensor(start["judged"]))
answers = answers_of(judged, PaddleLoader(source, Normalizer()), world)
result["answers"] = [answers.logits, answers.labels, answers.rows]

def write():
    (out / f"written-by-{world.rank}").touch()
    return "answer"

result["objects"] = d.gather_objects({"rank": world.rank}, world)
result["answer"] = d.main_writes(write, world)

def fail():
    raise ValueError("disk full")

try:
    d.main_writes(fail, world)
except (ValueError, RuntimeError) as error:
    result["failure"] = f"{type(error).__name__}: {error}"
d.barrier(world)
(out / f"rank{world.rank}").write_bytes(pickle.dumps(result))
d.stop()
"""


def logits_by_hand(weight):
    """Of the script's seven images, in float64."""
    images = np.random.default_rng(2).integers(0, 256, (7, 4, 4, 3))
    pixels = (images / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return pixels.transpose(0, 3, 1, 2).reshape(7, 48) @ weight


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    start = {k: v.numpy() for k, v in model.state_dict().items()}
    judged = np.random.default_rng(3).normal(size=(48, 3)).astype(np.float32)
    np.savez(tmp_path / "start.npz", judged=judged, **start)
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node=2"]
    options = ["--backend=gloo", f"--log_dir={tmp_path / 'logs'}"]
    done = subprocess.run(
        [*launcher, *options, str(tmp_path / "run.py"), str(tmp_path)],
        check=False,
        timeout=120,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (pickle.loads((tmp_path / f"rank{r}").read_bytes()) for r in (0, 1))

    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    data = np.random.default_rng(1)
    losses = []
    for _ in range(5):
        x = data.normal(size=(8, 5)).astype("float32")
        y = data.integers(3, size=8)
        loss = nn.functional.cross_entropy(model(paddle.to_tensor(x)), paddle.to_tensor(y))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    for name, weight in model.state_dict().items():
        assert np.array_equal(first["weights"][name], second["weights"][name])
        np.testing.assert_allclose(first["weights"][name], weight.numpy(), rtol=1e-5, atol=1e-6)
        assert not np.allclose(start[name], weight.numpy(), atol=1e-4), name
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    total = np.arange(11.0)[:, None] * [1.0, -2.0]
    for result in (first, second):
        assert np.array_equal(result["ordered"], total)
        logits, labels, rows = result["answers"]
        assert logits == pytest.approx(logits_by_hand(judged), rel=1e-4, abs=1e-4)
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and rows.tolist() == list(range(7))
        assert np.array_equal(result["uneven"], total[:7])
        assert result["weighted"] == pytest.approx(0.75)
        assert result["answer"] == "answer"
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
    assert first["failure"] == "ValueError: disk full"
    assert second["failure"] == "RuntimeError: the main process failed: disk full"
    assert [p.name for p in tmp_path.glob("written-by-*")] == ["written-by-0"]


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    world = distributed.start(device="cpu")
    assert world == distributed.World(0, 1, "cpu")
    assert world.is_main
    model = nn.Linear(1, 1)
    assert distributed.wrap(model, world) is model
    values, order = paddle.arange(6).reshape([3, 2]), paddle.to_tensor([2, 0, 1])
    got = distributed.gather_samples(paddle.index_select(values, order), order, world, total=3)
    assert got.tolist() == values.tolist()
    assert distributed.main_writes(lambda: 5, world) == 5
    assert distributed.all_mean(2.0, world) == 2.0
    distributed.barrier(world)
    distributed.stop()
    with pytest.raises(ValueError, match="disk"):
        distributed.main_writes(lambda: (_ for _ in ()).throw(ValueError("disk")), world)
    with pytest.raises(ValueError, match="2 of 3 samples were evaluated by no process"):
        distributed.gather_samples(values[:1], order[:1], world, total=3)
    with pytest.raises(ValueError, match=r"indices have shape \(1,\), expected \(2,\)"):
        distributed.gather_samples(values[:2], order[:1], world, total=3)
    with pytest.raises(ValueError, match="outside 0 to 1"):
        distributed.gather_samples(values, order, world, total=2)
    if not paddle.device.is_compiled_with_cuda():
        with pytest.raises(ValueError, match="device gpu:9 is not there"):
            distributed.start(device="cuda:9")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        distributed.start(device="tpu")
