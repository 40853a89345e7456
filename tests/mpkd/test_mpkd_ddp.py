"""Two processes under torchrun's environment: one network in both, the same as one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpkd.dataset.data_utils import evaluation_loader
from mpkd.dataset.sources import load_data
from mpkd.trainer.metrics_logger import read_metrics_csv
from mpkd.utils.common import evaluate, load_net
from mpkd.utils.config import load_config
from shared_core.for_torch.checkpoints import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def torchrun(argv, world: int = 2) -> list[subprocess.CompletedProcess]:
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
           "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}  # fmt: skip
    main = REPOSITORY / "packages" / "mpkd" / "main.py"
    started = [
        subprocess.Popen(
            [sys.executable, str(main), *argv], text=True,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip
    ended = []
    for process in started:
        out, err = process.communicate(timeout=240)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


@pytest.mark.slow
def test_two_processes_distil_under_torchruns_environment(tmp_path, words, command, teacher_file):
    more = {
        "model__teacher_ckpt": teacher_file, "experiment__epochs": 1, "training__ema": 0.9,
        "training__gradient_accumulation_steps": 2,
    }  # fmt: skip
    folder = tmp_path / "run"
    for stage, resume in (("prepare", []), ("teacher", ["--resume"])):
        done = command(*words(folder, "--stage", stage, *resume, **more))
        assert done.code == 0, done.err
    ended = torchrun(words(folder, "--stage", "distil", "--resume", **more))
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert ended[1].stdout == ""  # only the main process speaks
    weights, facts = load_checkpoint(folder / "checkpoints" / "student.pth")
    assert all(torch.isfinite(value).all() for value in weights.values())
    (csv,) = (folder / "logs").glob("*.csv")
    (row,) = read_metrics_csv(csv)
    images = 144  # of 160 wanted, less the rounding of ten classes
    assert row["step"] in {-(-images // 2 // 32) // 2 + n for n in (0, 1)}
    # What two processes evaluated together is what one finds alone.
    net, _ = load_net(folder / "checkpoints" / "student.pth")
    keys = {"dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160}
    config = load_config(None, (), overrides=keys | {"model.student_widths": [8, 16]})
    data = load_data(config, tmp_path / "again", data_root=None)
    loader = evaluation_loader(data, data.sets["test"], batch_size=64, device="cpu", threads=0)
    assert evaluate(net, loader).accuracy == facts["metrics"]["test_accuracy"]


def _worker(rank: int, folder: str, port: int) -> None:
    """One step of a network without norms, on this process' half of a batch."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}  # fmt: skip
    sys.path[:0] = [str(REPOSITORY / "tests" / "mpkd")]
    from test_mpkd_trainer import batches_of, make_trainer, student

    from shared_core.for_torch.distributed import start, stop

    torch.set_num_threads(1)
    world = start(device="cpu")
    net = student(norm=False)
    trainer = make_trainer(Path(folder) / str(rank), net, clip=0.05, world=world)
    whole = batches_of(4, (16, 16))
    share = [part._replace(images=part.images[rank::2], labels=part.labels[rank::2])
             for part in whole]  # fmt: skip
    for _ in range(3):
        trainer.step(share, 1e-2)
    torch.save(net.state_dict(), Path(folder) / f"net{rank}.pth")
    stop()


@pytest.mark.slow
def test_steps_of_two_processes_are_steps_of_one(tmp_path):
    import torch.multiprocessing as mp

    sys.path[:0] = [str(REPOSITORY / "tests" / "mpkd")]
    from test_mpkd_trainer import batches_of, make_trainer, student

    mp.start_processes(_worker, (str(tmp_path), free_port()), nprocs=2, start_method="spawn")
    nets = [torch.load(tmp_path / f"net{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    alone = student(norm=False)
    trainer = make_trainer(tmp_path / "alone", alone, clip=0.05)
    for _ in range(3):
        trainer.step(batches_of(4, (16, 16)), 1e-2)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(nets[0][name], value, rtol=1e-5, atol=1e-6)
