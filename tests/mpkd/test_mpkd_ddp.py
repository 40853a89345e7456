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
from mpkd.quant.budget import layer_options, size_budget
from mpkd.quant.cost import layer_facts
from mpkd.quant.search.sdq import Sdq
from mpkd.trainer.metrics_logger import read_metrics_csv
from mpkd.trainer.objectives import LearningTeacher, make_objective
from mpkd.utils.common import ALONE, evaluate, load_net
from mpkd.utils.config import load_config
from shared_core.for_torch.distributed import World

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
def test_a_whole_run_under_torchruns_environment(tmp_path, words, teacher_file):
    """Distilled and trained with few bits by two processes, exported by one."""
    more = {
        "model__teacher_ckpt": teacher_file, "experiment__epochs": 1, "training__ema": 0.9,
        "training__gradient_accumulation_steps": 2, "quantization__method": "qat",
        "quantization__w_bits": 3, "quantization__epochs": 2,
    }  # fmt: skip
    folder = tmp_path / "run"
    ended = torchrun(words(folder, **more))
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert ended[1].stdout == ""  # only the main process speaks
    (csv,) = (folder / "logs").glob("*.csv")
    rows = read_metrics_csv(csv)
    assert [row["stage"] for row in rows] == ["distil", "quantize-qat", "quantize-qat"]
    images = 144  # of 160 wanted, less the rounding of ten classes
    assert rows[0]["step"] in {-(-images // 2 // 32) // 2 + n for n in (0, 1)}
    # What two processes evaluated together is what one finds alone.
    keys = {"dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160}
    config = load_config(None, (), overrides=keys | {"model.student_widths": [8, 16]})
    data = load_data(config, tmp_path / "again", data_root=None)
    loader = evaluation_loader(data, data.sets["test"], batch_size=64, device="cpu", threads=0)
    for name in ("student", "student_quantized"):
        net, facts = load_net(folder / "checkpoints" / f"{name}.pth")
        assert all(torch.isfinite(value).all() for value in net.state_dict().values())
        assert evaluate(net, loader).accuracy == facts["metrics"]["test_accuracy"]
    assert (folder / "export" / "model.json").exists()


def _worker(rank: int, folder: str, port: int) -> None:
    """Steps on this process' half of each batch: plain, with a learning teacher, with SDQ."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}  # fmt: skip
    sys.path[:0] = [str(REPOSITORY / "tests" / "mpkd")]
    from test_mpkd_trainer import batches_of

    from shared_core.for_torch.distributed import start, stop

    torch.set_num_threads(1)
    world = start(device="cpu")
    whole = batches_of(4, (16, 16))
    share = [part._replace(images=part.images[rank::2], labels=part.labels[rank::2])
             for part in whole]  # fmt: skip
    torch.save(steps(Path(folder) / str(rank), share, world), Path(folder) / f"net{rank}.pth")
    stop()


def steps(folder: Path, batches: list, world: World) -> dict[str, dict]:
    """What three steps of accumulated batches make of each kind of training."""
    from test_mpkd_trainer import make_trainer, student

    made = {}
    plain = student(norm=False)
    trainer = make_trainer(folder / "plain", plain, clip=0.05, world=world, accumulation=2)
    for _ in range(3):
        trainer.step(batches, 1e-2)
    made["plain"] = plain.state_dict()
    net, helper = student(norm=False), LearningTeacher(student(1, norm=False))
    trainer = make_trainer(
        folder / "both", net, world=world, helper=helper,
        objective=make_objective({"distillation.mode": "apprentice_a"}, helper),
    )  # fmt: skip
    for _ in range(3):
        trainer.step(batches, 1e-2)
    made["both"] = net.state_dict() | {f"t.{k}": v for k, v in helper.teacher.state_dict().items()}
    search = sdq_of(student(norm=False))
    trainer = make_trainer(folder / "sdq", search.net, world=world, companion=search)
    trainer._total = 10
    for number in range(3):
        trainer._step = number
        trainer.step(batches, 1e-3)
    made["sdq"] = search.net.state_dict() | {"beta": search.beta.detach()}
    return made


def sdq_of(net: torch.nn.Module) -> Sdq:
    facts = layer_facts(net, 8)
    w = layer_options(facts, (2, 4, 8), first_last=None)
    return Sdq(net, size_budget(facts, 3.0, w_options=w, a_options=dict.fromkeys(w, (32,))))


def test_steps_of_two_processes_are_steps_of_one(tmp_path):
    """Gradients of networks, of a teacher beside them and of SDQ's gates are those of one."""
    import torch.multiprocessing as mp

    sys.path[:0] = [str(REPOSITORY / "tests" / "mpkd")]
    from test_mpkd_trainer import batches_of

    mp.start_processes(_worker, (str(tmp_path), free_port()), nprocs=2, start_method="spawn")
    nets = [torch.load(tmp_path / f"net{rank}.pth", weights_only=True) for rank in (0, 1)]
    alone = steps(tmp_path / "alone", batches_of(4, (16, 16)), ALONE)
    for kind, wanted in alone.items():
        for name, value in wanted.items():
            assert torch.equal(nets[0][kind][name], nets[1][kind][name]), (kind, name)
            torch.testing.assert_close(nets[0][kind][name], value, rtol=1e-4, atol=2e-5)
