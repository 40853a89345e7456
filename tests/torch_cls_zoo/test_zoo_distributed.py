"""Two processes over gloo: the numbers of one, no image lost or doubled, one that writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.for_torch.accuracy import answers_of
from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.for_torch.distributed import World
from shared_core.runs import read_metrics, read_result
from torch_cls_zoo.applications import launch as launching
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.folders import open_data, part
from torch_cls_zoo.dataloader.loaders import InputSettings, eval_loader
from torch_cls_zoo.models import build_model

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = REPOSITORY / "packages" / "torch_cls_zoo" / "main.py"
ARCH = "test_resnet"

# Several commands in one process group, so that torch is imported once by each process.
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
from shared_core.datasets import ImageSet
from shared_core.for_torch.distributed import start, stop
from torch_cls_zoo.applications.dispatch import run
from torch_cls_zoo.applications.test import run_network
from torch_cls_zoo.applications.train import Training
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.folders import Part
from torch_cls_zoo.dataloader.loaders import InputSettings, eval_loader

rank, folder, jobs = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = start(device="cpu", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
found = {}
run(parse(jobs["train"]), world)
run(parse(jobs["evaluate"]), world)

# Stopped after the third save, in the middle of an epoch, in both processes; then gone on with.
saved, count = Training._save, []
def save(self):
    saved(self)
    count.append(self.epoch)
    if len(count) == 4:
        raise KeyboardInterrupt
Training._save = save
try:
    run(parse(jobs["stopped"]), world)
except KeyboardInterrupt:
    found["stopped in epoch"] = count[-1]
Training._save = saved
run(parse([*jobs["stopped"], "--resume"]), world)

# An evaluation that is shared out, by a network that reads the number painted into an image.
class Reads(nn.Module):
    def forward(self, images):
        return images[:, :1, 0, 0] * torch.tensor([[1.0, -1.0]])
pixels = np.zeros((11, 4, 4, 3), np.uint8)
pixels[:, 0, 0, 0] = np.arange(11)
part = Part("test", ImageSet(None, np.zeros(11, int), source=pixels),
            tuple(f"{n}.png" for n in range(11)))
settings = InputSettings((4, 4), (0.0,) * 3, (1 / 255,) * 3)
loader = eval_loader(part.images, settings, batch_size=3, world=world, threads=0)
outputs = run_network(Reads(), loader, part, world)
found["rows"], found["logits"] = outputs.rows.tolist(), outputs.logits.tolist()
try:
    run(parse(jobs["wrong"]), world)
except (ValueError, RuntimeError) as error:
    found["error"] = f"{type(error).__name__}: {error}"
Path(folder, f"{rank}.json").write_text(json.dumps(found))
stop()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, zoo_folder) -> Path:
    """21 training images, 15 to validate, 15 to test: two processes divide none of them."""
    return zoo_folder(
        tmp_path_factory.mktemp("uneven") / "data", counts={"train": 7, "val": 5, "test": 5}
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory, uneven, zoo_words, zoo_best) -> tuple[Path, list[dict], str]:
    """A folder with what the script left, what each process found, and what they said."""
    import json

    folder = tmp_path_factory.mktemp("two")
    words = ["--epochs", 2, "-b", "4"]
    evaluate = ["-e", "--data", uneven, "--resume", zoo_best, "-b", "4", "-j", "1"]
    jobs = {
        "train": zoo_words(folder / "run", *words, data=uneven),
        "stopped": zoo_words(folder / "again", *words, "--save_every", 1, data=uneven),
        "evaluate": [*map(str, evaluate), "--no-cuda", "--output", str(folder / "evaluate")],
        "wrong": zoo_words(folder / "wrong", "-a", "no_such_net", data=uneven),
    }
    path = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(folder), json.dumps(jobs)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert "epoch" in said[0] and "epoch" not in said[1]  # one process speaks
    return folder, found, said[0]


def test_evaluation_in_two_processes_is_that_of_one(two, uneven, zoo_best, zoo_command, tmp_path):
    one = zoo_command("-e", "--data", uneven, "--resume", zoo_best, "-b", "4", "-j", "1",
                      "--no-cuda", "--output", tmp_path)  # fmt: skip
    assert one.code == 0, one.err
    mine, theirs = (
        read_result(folder / "result.json")["measured"]["test"]
        for folder in (two[0] / "evaluate", tmp_path)
    )
    assert mine["confusion"] == theirs["confusion"] and mine["images"] == 15
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for name in ("misclassified.csv", "per_class.csv"):
        assert (two[0] / "evaluate" / name).read_text() == (tmp_path / name).read_text()


def test_training_writes_once(two):
    run = two[0] / "run"
    lines = read_metrics(run / "metrics.jsonl")
    assert [(line["split"], line["epoch"]) for line in lines] == [
        ("train", 0), ("val", 0), ("train", 1), ("val", 1),
    ]  # fmt: skip
    assert lines[0]["images"] == 22  # 11 each: one comes twice, so that both have as many batches
    assert lines[1]["images"] == 15
    assert len(list((run / "logs").iterdir())) == 1  # one process writes events
    record = read_result(run / "result.json")
    assert record["measured"]["training"]["processes"] == 2
    assert record["measured"]["test"]["images"] == 15


def test_validation_is_of_the_weights_that_are_saved(two, uneven, tmp_path):
    """Each process' last step has moved batch-norm statistics of its own: both must use those
    of the main process, which are saved."""
    weights, facts = load_checkpoint(two[0] / "run" / "checkpoints" / f"checkpoint_{ARCH}.pth")
    net = build_model(ARCH, num_classes=3, image_size=(24, 24)).model
    net.load_state_dict(weights)
    val = part(open_data(str(uneven), tmp_path), "val")
    settings, world = (
        InputSettings((24, 24), facts["mean"], facts["std"]),
        World(0, 1, 0, torch.device("cpu")),
    )
    loader = eval_loader(val.images, settings, batch_size=4, world=world, threads=0)
    answers = answers_of(net, loader, world)
    loss = nn.functional.cross_entropy(
        torch.from_numpy(answers.logits), torch.from_numpy(answers.labels)
    )
    last = read_metrics(two[0] / "run" / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert last["accuracy"] == pytest.approx(answers.accuracy)


def test_a_training_that_was_stopped_in_an_epoch_goes_on_exactly(two, zoo_digests):
    assert [one["stopped in epoch"] for one in two[1]] == [1, 1]
    assert zoo_digests(two[0] / "again") == zoo_digests(two[0] / "run")


def test_gathered_outputs_are_in_order_in_every_process(two):
    for found in two[1]:
        assert found["rows"] == list(range(11))
        np.testing.assert_allclose(found["logits"], [[n, -n] for n in range(11)], atol=1e-3)


def test_an_error_is_told_by_one_and_leaves_nothing(two):
    assert "no_such_net" in two[1][0]["error"] and not (two[0] / "wrong").exists()


def test_the_readme_s_flags_start_processes_and_a_failure_ends_them(tmp_path):
    meeting = f"tcp://127.0.0.1:{free_port()}"
    words = ["--train", "--no-cuda", "--nodes", "1", "--rank", "0", "--gpus", "2",
             "--init_method", meeting, "--output", str(tmp_path)]  # fmt: skip
    begun = time.monotonic()
    assert launching.launch(parse(words), _work) == 1
    assert time.monotonic() - begun < 100  # process 0 would wait for a much longer time
    assert {path.name for path in tmp_path.iterdir()} == {"0 of 2", "1 of 2"}


def _work(config, world) -> None:
    """Tells its number; then one process fails and the other waits."""
    (config.run.output / f"{world.rank} of {world.world_size}").touch()
    torch.distributed.barrier()
    if world.rank == 1:
        raise ValueError("the disk is full")
    time.sleep(1000)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs; torchrun gives each of its own a session of its own."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


@pytest.mark.slow
def test_two_processes_of_torchrun_that_are_killed_go_on_exactly(
    two, uneven, zoo_words, zoo_digests, tmp_path
):
    """Started by torchrun, killed with all its children, started again."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    words = zoo_words(tmp_path / "run", "--epochs", 2, "-b", "4", "--save_every", 1, data=uneven)
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}

    def torchrun(*more) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                   "--master_addr", "127.0.0.1", "--master_port", str(free_port()), str(MAIN),
                   *words, *more]  # fmt: skip
        return subprocess.Popen(
            command,
            env={**base, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    state, seen = tmp_path / "run" / "state" / "train.pth", set()
    process = torchrun()
    while len(seen) < 2 and process.poll() is None:
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.001)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "result.json").exists()
    again = torchrun("--resume")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said[-2000:]
    assert "going on at epoch" in said
    assert zoo_digests(tmp_path / "run") == zoo_digests(two[0] / "run")


def test_sync_batch_norm_replaces_every_batch_norm():
    """It computes on GPUs only; that the layers are there is what a CPU can see."""
    net = build_model("resnet18", num_classes=3).model
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) == norms == 20


def test_sync_batch_norm_on_a_cpu_is_refused(zoo_words, zoo_command, tmp_path):
    done = zoo_command(*zoo_words(tmp_path / "run", "--sync_bn"))
    assert done.code == 2 and "--sync_bn" in done.err and done.err.count("\n") == 1
