"""Two processes on a CPU compute what one computes on the whole batch, and write once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from shared_core.for_torch import distributed  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
from shared_core.datasets import BatchLoader, EpochOrder, ImageSet
from shared_core.datasets.views.augment import EvalView
from shared_core.for_torch import distributed as d
from shared_core.for_torch.accuracy import Answers, answers_of
from shared_core.for_torch.data import Normalizer, TorchLoader

out, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
world = d.start(
    device="cpu", timeout_s=60, rank=rank, world_size=2, init_method=f"file://{out}/meeting"
)
torch.manual_seed(rank)  # other first weights: the main process' are copied
result = {}

def net(width):
    return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 3))

def steps(forward, modules, group):
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    data, losses = torch.Generator().manual_seed(1), []
    for step in range(5):
        for number in range(group):
            x, y = torch.randn(8, 5, generator=data), torch.randint(3, (8,), generator=data)
            own = slice(rank, None, 2)
            with d.accumulating(forward, last=number + 1 == group):
                loss = forward(x[own], y[own])
                (loss / group).backward()
            losses.append(d.all_mean(loss.item(), world))
        optimizer.step()
        optimizer.zero_grad()
    return losses

model = net(8)
wrapped = d.wrap(model, world)
assert d.unwrap(wrapped) is model
result["first"] = {k: v.clone() for k, v in model.state_dict().items()}
result["losses"] = steps(
    lambda x, y: nn.functional.cross_entropy(wrapped(x), y), [model], group=1
)
result["weights"] = dict(model.state_dict())

# two modules, called by a function in their own ways, three batches a step; counted messages
pair, sent = [net(8), net(4)], []
def loss_of(x, y):
    return nn.functional.cross_entropy(pair[0](x) + pair[1][:2](x).sum(1, keepdim=True)
                                       * pair[1][2:](pair[1][:2](x)), y)
both = d.together(loss_of, pair, world)
both.register_comm_hook(None, lambda state, bucket: (
    sent.append(bucket.index()),
    torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        .then(lambda done: done.value()[0]),
)[1])
result["pair first"] = [dict(module.state_dict()) for module in pair]
result["pair first"] = [{k: v.clone() for k, v in one.items()} for one in result["pair first"]]
result["pair losses"] = steps(both, pair, group=3)
result["pair"] = [dict(module.state_dict()) for module in pair]
result["messages"] = len(sent)

# buffers of several types, then an evaluation that is shared out
images = np.arange(7 * 4 * 4 * 3, dtype=np.uint8).reshape(7, 4, 4, 3)
labels = np.array([0, 1, 0, 1, 1, 1, 0])
normed = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
normed.register_buffer("flag", torch.tensor([rank == 0, True]))
normed.load_state_dict({k: torch.full_like(v, 0.01 + rank) if "running" in k else
                        torch.linspace(-1, 1, v.numel()).reshape(v.shape).to(v.dtype)
                        for k, v in normed.state_dict().items() if k != "flag"}, strict=False)
normed[0].num_batches_tracked.fill_(3 + rank)
d.share_buffers(normed, world)
result["buffers"] = dict(normed.named_buffers())
source = BatchLoader(
    ImageSet(None, labels, source=images), view=EvalView(4, resize_ratio=None), batch_size=2,
    threads=0,
    order=EpochOrder(7, shuffle=False, rank=rank, world_size=2, uneven="keep"),
)
answers: Answers = answers_of(normed.train(), TorchLoader(source, Normalizer()), world)
assert normed.training
result["answers"] = [torch.from_numpy(a) for a in (answers.logits, answers.labels, answers.rows)]

# 11 samples: process 0 has 6 of them, process 1 has 6 too (number 10 twice), then uneven shares
total = torch.arange(11.0)[:, None] * torch.tensor([1.0, -2.0])
mine = torch.tensor([0, 2, 4, 6, 8, 10] if rank == 0 else [1, 3, 5, 7, 9, 10])
result["ordered"] = d.gather_samples(total[mine], mine, world, total=11)
share = total[:7] if rank == 0 else total[:0]
result["uneven"] = d.gather_uneven(share, world)
result["weighted"] = d.all_mean(float(rank), world, weight=1.0 + 2 * rank)
result["objects"] = d.gather_objects({"rank": rank}, world)
try:
    d.gather_samples(total[:2], torch.tensor([rank, 2]), world, total=11)
except ValueError as error:
    result["missing"] = str(error)

def write():
    (out / f"written-by-{rank}").touch()
    return "answer"

result["answer"] = d.main_writes(write, world)

def fail():
    raise ValueError("disk full")

try:
    d.main_writes(fail, world)
except (ValueError, RuntimeError) as error:
    result["failure"] = f"{type(error).__name__}: {error}"

# longer than a collective of this world may take
made, new_group = [], torch.distributed.new_group
torch.distributed.new_group = lambda **how: made.append(how["timeout"].days) or new_group(**how)
result["long answer"] = d.main_works(lambda: "done", world)
result["patience"] = made
try:
    d.main_works(fail, world)
except (ValueError, RuntimeError) as error:
    result["long failure"] = f"{type(error).__name__}: {error}"
d.barrier(world)
torch.save(result, out / f"rank{rank}.pth")
d.stop()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What the two processes of the script found."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.py").write_text(SCRIPT)
    env = os.environ | {
        "PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, str(folder / "run.py"), str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], env=env) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [p.name for p in folder.glob("written-by-*")] == ["written-by-0"]
    return [torch.load(folder / f"rank{r}.pth", weights_only=True) for r in (0, 1)]


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 3))


def steps(forward, modules, group):
    """The script's steps in one process on the whole batches."""
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1, momentum=0.9)
    data, losses = torch.Generator().manual_seed(1), []
    for _ in range(5):
        loss = 0.0
        for _ in range(group):
            x, y = torch.randn(8, 5, generator=data), torch.randint(3, (8,), generator=data)
            one = nn.functional.cross_entropy(forward(x), y)
            losses.append(one.item())
            loss = loss + one / group
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def same(found: list[dict], weights: dict, first: dict) -> None:
    for name, weight in weights.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], weight, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(first[name], weight, atol=1e-4), name


def test_two_processes_learn_what_one_does(results):
    model = net(8)
    model.load_state_dict(results[0]["first"])
    for name, value in results[1]["first"].items():
        assert torch.equal(value, results[0]["first"][name])
    losses = steps(model, [model], group=1)
    same([one["weights"] for one in results], model.state_dict(), results[0]["first"])
    assert results[0]["losses"] == results[1]["losses"] == pytest.approx(losses, rel=1e-5)


def test_a_function_of_two_modules_accumulates_and_sends_once_a_step(results):
    pair = [net(8), net(4)]
    for module, state in zip(pair, results[0]["pair first"], strict=True):
        module.load_state_dict(state)

    def forward(x):
        low = pair[1][:2](x)
        return pair[0](x) + low.sum(1, keepdim=True) * pair[1][2:](low)

    losses = steps(forward, pair, group=3)
    for number, module in enumerate(pair):
        first = results[0]["pair first"][number]
        same([one["pair"][number] for one in results], module.state_dict(), first)
    assert results[0]["pair losses"] == pytest.approx(losses, rel=1e-5)
    assert results[0]["messages"] == 5  # one bucket holds them all; not one a batch


def test_buffers_and_an_evaluation_that_is_shared_out(results):
    for one in results:
        assert one["buffers"]["flag"].tolist() == [True, True]
        assert one["buffers"]["0.num_batches_tracked"] == 3
        torch.testing.assert_close(one["buffers"]["0.running_var"], torch.full((3,), 0.01))
        logits, labels, rows = one["answers"]
        assert labels.tolist() == [0, 1, 0, 1, 1, 1, 0]
        assert rows.tolist() == list(range(7))
        # by hand: bytes, ImageNet's mean and deviation, then batch norm, then the linear layer
        pixels = np.arange(7 * 48, dtype=np.uint8).reshape(7, 4, 4, 3).astype(np.float64)
        inputs = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        normed = (inputs - 0.01) / np.sqrt(0.01 + 1e-5) * np.linspace(-1, 1, 3)
        normed = (normed + np.linspace(-1, 1, 3)).transpose(0, 3, 1, 2).reshape(7, 48)
        weight = np.linspace(-1, 1, 96).reshape(2, 48)
        np.testing.assert_allclose(logits.numpy(), normed @ weight.T + [-1, 1], rtol=1e-4)


def test_gathering_and_writing_once(results):
    total = torch.arange(11.0)[:, None] * torch.tensor([1.0, -2.0])
    for result in results:
        assert torch.equal(result["ordered"], total)
        assert torch.equal(result["uneven"], total[:7])
        assert result["weighted"] == pytest.approx(0.75)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert result["answer"] == "answer"
        assert result["missing"] == (
            "8 of 11 samples were evaluated by no process, the first is number 3"
        )
    assert results[0]["failure"] == "ValueError: disk full"
    assert results[1]["failure"] == "RuntimeError: the main process failed: disk full"
    assert [one["long answer"] for one in results] == ["done", "done"]
    assert [one["patience"] for one in results] == [[7, 7], [7, 7]]
    assert [one["long failure"] for one in results] == [one["failure"] for one in results]


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
