"""Two processes over gloo: the numbers of one, no image lost or doubled, one that writes."""

from __future__ import annotations

import json
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

from shared_core.runs import read_metrics, read_result

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = REPOSITORY / "packages" / "torch_cls_zoo" / "main.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(*command, env=None) -> subprocess.CompletedProcess:
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300,
        env={**base, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, zoo_folder) -> Path:
    """21 training images, 15 to validate, 15 to test: two processes divide none of them."""
    return zoo_folder(
        tmp_path_factory.mktemp("uneven") / "data", counts={"train": 7, "val": 5, "test": 5}
    )


@pytest.mark.slow
def test_evaluation_in_two_processes_is_that_of_one(
    uneven, zoo_best, zoo_command, zoo_python, tmp_path
):
    words = ["-e", "--data", uneven, "--resume", zoo_best, "-b", "4", "-j", "1", "--threads", "1"]
    one = zoo_command(*words, "--no-cuda", "--output", tmp_path / "one")
    assert one.code == 0, one.err
    two = run(zoo_python, MAIN, *words, "--no-cuda", "--gpus", "2", "--init_method",
              f"tcp://127.0.0.1:{free_port()}", "--output", tmp_path / "two")  # fmt: skip
    assert two.returncode == 0, two.stderr
    mine, theirs = (
        read_result(tmp_path / name / "result.json")["measured"]["test"] for name in ("two", "one")
    )
    assert mine["confusion"] == theirs["confusion"] and mine["images"] == 15
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert two.stdout.count("test: accuracy") == 1  # one process speaks
    for name in ("misclassified.csv", "per_class.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs; torchrun gives each of its own a session of its own."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


@pytest.fixture(scope="module")
def by_flags(tmp_path_factory, uneven, zoo_words, zoo_python) -> Path:
    """A training of two processes that the README's own flags start."""
    folder = tmp_path_factory.mktemp("flags") / "run"
    words = zoo_words(folder, "--epochs", 2, "-b", "4", "--save_every", 1, data=uneven)
    done = run(zoo_python, MAIN, *words, "--nodes", "1", "--rank", "0", "--gpus", "2",
               "--init_method", f"tcp://127.0.0.1:{free_port()}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_training_by_the_readme_s_flags_writes_once(by_flags):
    lines = read_metrics(by_flags / "metrics.jsonl")
    assert [(line["split"], line["epoch"]) for line in lines] == [
        ("train", 0), ("val", 0), ("train", 1), ("val", 1),
    ]  # fmt: skip
    assert lines[0]["images"] == 22  # 11 each: one comes twice, so that both have as many batches
    assert lines[1]["images"] == 15
    assert len(list((by_flags / "logs").iterdir())) == 1  # one process writes events
    record = read_result(by_flags / "result.json")
    assert record["measured"]["training"]["processes"] == 2
    assert record["measured"]["test"]["images"] == 15


@pytest.mark.slow
def test_two_processes_killed_in_an_epoch_go_on_exactly(
    by_flags, uneven, zoo_words, zoo_digests, tmp_path
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
    assert zoo_digests(tmp_path / "run") == zoo_digests(by_flags)


@pytest.mark.slow
def test_an_error_in_two_processes_is_one_line_and_ends_both(uneven, zoo_python, tmp_path):
    done = run(zoo_python, MAIN, "--train", "--data", uneven, "-a", "no_such_net", "--no-cuda",
               "--gpus", "2", "--init_method", f"tcp://127.0.0.1:{free_port()}",
               "--output", tmp_path / "run")  # fmt: skip
    assert done.returncode == 1
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and "no_such_net" in errors.pop()
    assert "Traceback" not in done.stderr


def test_sync_batch_norm_replaces_every_batch_norm():
    """It computes on GPUs only; that the layers are there is what a CPU can see."""
    from torch_cls_zoo.models import build_model

    net = build_model("resnet18", num_classes=3).model
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) == norms == 20


def test_sync_batch_norm_on_a_cpu_is_refused(zoo_words, zoo_command, tmp_path):
    done = zoo_command(*zoo_words(tmp_path / "run", "--sync_bn"))
    assert done.code == 2 and "--sync_bn" in done.err and done.err.count("\n") == 1


def _share(rank: int, world_size: int, port: int, folder: str, total: int) -> None:
    """One of the processes of the test below: its share of an evaluation with a known network."""
    from shared_core.datasets import ImageSet
    from shared_core.for_torch.distributed import start, stop
    from torch_cls_zoo.applications.test import run_network
    from torch_cls_zoo.dataloader.folders import Part
    from torch_cls_zoo.dataloader.loaders import InputSettings, eval_loader

    world = start(device="cpu", rank=rank, world_size=world_size,
                  init_method=f"tcp://127.0.0.1:{port}")  # fmt: skip
    pixels = np.zeros((total, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(total)
    part = Part("test", ImageSet(None, np.zeros(total, int), source=pixels),
                tuple(f"{n}.png" for n in range(total)))  # fmt: skip
    settings = InputSettings((4, 4), (0.0,) * 3, (1 / 255,) * 3)
    loader = eval_loader(part.images, settings, batch_size=3, world=world, threads=0)

    class Reads(nn.Module):
        """Gives back the number that is painted into the image."""

        def forward(self, images):
            return images[:, :1, 0, 0] * torch.tensor([[1.0, -1.0]])

    outputs = run_network(Reads(), loader, part, world)
    Path(folder, f"{rank}.json").write_text(
        json.dumps([outputs.rows.tolist(), outputs.logits.tolist()])
    )
    stop()


@pytest.mark.slow
def test_gathered_outputs_are_in_order_in_every_process(tmp_path):
    total, world_size, port = 11, 2, free_port()
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_share, args=(r, world_size, port, str(tmp_path), total))
                 for r in range(world_size)]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(world_size):
        rows, logits = json.loads((tmp_path / f"{rank}.json").read_text())
        assert rows == list(range(total))
        np.testing.assert_allclose(logits, [[n, -n] for n in range(total)], atol=1e-3)
