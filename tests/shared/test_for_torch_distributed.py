"""Two processes on a CPU compute what one computes on the whole batch, and write once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from shared_core.for_torch import distributed  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from shared_core.for_torch import distributed as d

out = Path(sys.argv[1])
torch.set_num_threads(1)
world = d.start(device="cpu", timeout_s=60)
assert world.world_size == 2
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
wrapped = d.wrap(model, world)
assert d.unwrap(wrapped) is model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
data = torch.Generator().manual_seed(1)
losses = []
for step in range(5):
    x = torch.randn(8, 5, generator=data)
    y = torch.randint(3, (8,), generator=data)
    own = slice(world.rank, None, 2)
    loss = nn.functional.cross_entropy(wrapped(x[own]), y[own])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(d.all_mean(loss.item(), world))
result = {"weights": dict(model.state_dict()), "losses": losses}

# 11 samples: process 0 has 6 of them, process 1 has 6 too (number 10 twice), then uneven shares
total = torch.arange(11.0)[:, None] * torch.tensor([1.0, -2.0])
mine = torch.tensor([0, 2, 4, 6, 8, 10] if world.rank == 0 else [1, 3, 5, 7, 9, 10])
result["ordered"] = d.gather_samples(total[mine], mine, world, total=11)
share = total[:7] if world.rank == 0 else total[:0]
result["uneven"] = d.gather_uneven(share, world)
result["weighted"] = d.all_mean(float(world.rank), world, weight=1.0 + 2 * world.rank)
result["objects"] = d.gather_objects({"rank": world.rank}, world)
try:
    d.gather_samples(total[:2], torch.tensor([world.rank, 2]), world, total=11)
except ValueError as error:
    result["missing"] = str(error)

def write():
    (out / f"written-by-{world.rank}").touch()
    return "answer"

result["answer"] = d.main_writes(write, world)

def fail():
    raise ValueError("disk full")

try:
    d.main_writes(fail, world)
except (ValueError, RuntimeError) as error:
    result["failure"] = f"{type(error).__name__}: {error}"
d.barrier(world)
torch.save(result, out / f"rank{world.rank}.pth")
d.stop()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--nnodes=1"]
    meeting = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    subprocess.run(
        [*launcher, *meeting, str(tmp_path / "run.py"), str(tmp_path)],
        check=True,
        timeout=120,
        env=os.environ
        | {"PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    first, second = (torch.load(tmp_path / f"rank{r}.pth", weights_only=True) for r in (0, 1))

    # the same five steps in one process on the whole batch
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(5):
        x = torch.randn(8, 5, generator=data)
        y = torch.randint(3, (8,), generator=data)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, weight in model.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(start[name], weight, atol=1e-4), name
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)

    total = torch.arange(11.0)[:, None] * torch.tensor([1.0, -2.0])
    for result in (first, second):
        assert torch.equal(result["ordered"], total)
        assert torch.equal(result["uneven"], total[:7])
        assert result["weighted"] == pytest.approx(0.75)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert result["answer"] == "answer"
        assert result["missing"] == (
            "8 of 11 samples were evaluated by no process, the first is number 3"
        )
    assert first["failure"] == "ValueError: disk full"
    assert second["failure"] == "RuntimeError: the main process failed: disk full"
    assert [p.name for p in tmp_path.glob("written-by-*")] == ["written-by-0"]


def test_one_process_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.start(device="cpu")
    assert world == distributed.World(0, 1, 0, torch.device("cpu"))
    assert world.is_main
    model = nn.Linear(1, 1)
    assert distributed.wrap(model, world) is model
    values = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(distributed.gather_uneven(values, world), values)
    order = torch.tensor([2, 0, 1])
    got = distributed.gather_samples(values[order], order, world, total=3)
    assert torch.equal(got, values)
    assert distributed.main_writes(lambda: 5, world) == 5
    assert distributed.all_mean(2.0, world) == 2.0
    assert distributed.gather_objects("x", world) == ["x"]
    distributed.barrier(world)
    distributed.stop()
    with pytest.raises(ValueError, match="disk"):
        distributed.main_writes(lambda: (_ for _ in ()).throw(ValueError("disk")), world)


def test_errors(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="rank is 2, expected 0 to 1"):
        distributed.start(device="cpu", rank=2, world_size=2)
    with pytest.raises(ValueError, match="no meeting place is given; start with torchrun"):
        distributed.start(device="cpu", rank=0, world_size=2)
    with pytest.raises(ValueError, match="device cuda:99 is not there"):
        distributed.start(device="cuda:99")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK is 'first', expected a whole number"):
        distributed.start(device="cpu")
    world = distributed.World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"indices have shape \(1,\), expected \(2,\)"):
        distributed.gather_samples(torch.zeros(2), torch.tensor([0]), world, total=2)
    with pytest.raises(ValueError, match="outside 0 to 1"):
        distributed.gather_samples(torch.zeros(2), torch.tensor([0, 2]), world, total=2)
