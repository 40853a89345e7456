"""A teacher that OpenVINO computes: torch's numbers, silence on the network, resume, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import pytest
import torch

from mpkd import stages
from mpkd.dataset.sources import load_data
from mpkd.deploy.openvino_net import OpenVinoNet
from mpkd.model.networks import build_net
from mpkd.model.student import SimpleCNN
from mpkd.run_context import Run, check_engine_device
from mpkd.trainer import trainer as trainer_module
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.utils import config as config_module
from mpkd.utils.config import check_config, load_config
from shared_core.runs import StageLog, UsageError

installed = pytest.mark.skipif(util.find_spec("openvino") is None, reason="needs openvino")
ENGINE = {"distillation__teacher_engine": "openvino"}


def lively(name: str, size: int) -> torch.nn.Module:
    """A random network whose batch norms hold statistics of data, so that its logits differ."""
    torch.manual_seed(0)
    net = build_net({"name": name, "image_size": size, "stem": "auto"}, num_classes=10)
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.randn(8, 3, size, size))
    return net.eval()


@installed
@pytest.mark.parametrize(("name", "size"), [("resnet18", 8), ("simple_cnn", 8)])
def test_its_logits_are_torchs(name, size):
    if name == "simple_cnn":
        torch.manual_seed(1)
        net = SimpleCNN(10, widths=(16, 32)).eval()
    else:
        net = lively(name, size)
    twin = OpenVinoNet(net, image_size=size, threads=1)
    for count, layout in ((7, torch.contiguous_format), (3, torch.channels_last), (7, None)):
        images = torch.randn(count, 3, size, size)
        images = images.contiguous(memory_format=layout) if layout else images.transpose(2, 3)
        with torch.no_grad():
            wanted = net(images)
        found = twin(images)
        assert found.dtype == torch.float32 and not found.requires_grad
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
        assert torch.equal(twin(images), found)
    # An answer stays what it was when the next one is computed.
    first = twin(images)
    kept = first.clone()
    twin(torch.zeros_like(images))
    assert torch.equal(first, kept)


REPORTS = """
import torch
from mpkd.deploy.openvino_net import convert_openvino
from shared_core.deploy.openvino_file import unreported
convert_openvino(torch.nn.Conv2d(3, 2, 3), 8)
{nncf}
import openvino_telemetry, os
print(openvino_telemetry.Telemetry().consent, os.environ.get("CI"))
"""


@installed
@pytest.mark.slow
def test_nothing_is_reported(tmp_path):
    # Where it believes that it runs for a user, OpenVINO makes itself an identity at home and
    # sends its statistics away: with the import and with each conversion.
    nncf = "with unreported(): import nncf" if util.find_spec("nncf") else ""
    keep = {k: v for k, v in os.environ.items() if k not in ("CI", "NNCF_CI")}
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REPORTS.format(nncf=nncf)],
        env=keep | {"HOME": str(tmp_path), "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-2:] == ["False", "None"]
    assert not (tmp_path / "intel").exists()


@installed
@pytest.mark.slow
def test_a_training_with_it_runs_and_resumes_bit_by_bit(
    tmp_path, monkeypatch, words, command, teacher_file, digests
):
    changes = ENGINE | {
        "model__teacher_ckpt": teacher_file, "logging__log_interval": 2,
        "distillation__cache_teacher_logits": "false",
    }  # fmt: skip
    given = stages.settings_from
    monkeypatch.setattr(
        stages, "settings_from", lambda *a, **more: replace(given(*a, **more), save_seconds=0.0)
    )
    made = []
    build = OpenVinoNet.__init__
    monkeypatch.setattr(
        OpenVinoNet, "__init__", lambda self, *a, **k: (made.append(k), build(self, *a, **k))[1]
    )
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = command(*words(whole, **changes))
    assert done.code == 0, done.err
    assert made == [{"image_size": 8, "threads": 1, "precision": "f32"}]

    class Stopped(Exception):
        pass

    save, saves = trainer_module.StageState.save, []

    def saving(self, **counters):
        save(self, **counters)
        saves.append(1)
        if len(saves) == 2:
            raise Stopped

    with monkeypatch.context() as stopping, pytest.raises(Stopped):
        stopping.setattr(trainer_module.StageState, "save", saving)
        command(*words(part, **changes))
    done = command(*words(part, "--resume", **changes))
    assert done.code == 0 and "resumed at epoch" in done.out, done.err
    assert digests(part) == digests(whole)
    assert (part / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    # Another engine is another run.
    done = command(*words(part, "--resume", **changes | {"distillation__teacher_engine": "torch"}))
    assert done.code == 1 and "distillation.teacher_engine" in done.err


@installed
@pytest.mark.parametrize("cached", [True, False])
def test_a_run_gets_the_teachers_own_answers(tmp_path, monkeypatch, cached):
    keys = {
        "dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 48,
        "dataset.workers": 0, "experiment.batch_size": 16, "distillation.views": 2,
        "distillation.cache_teacher_logits": cached, "distillation.teacher_engine": "openvino",
    }  # fmt: skip
    chosen = load_config(None, (), overrides=keys)
    data = load_data(chosen, tmp_path, data_root=None)
    csv = MetricsLogger(tmp_path / "t.csv", run_id="t")
    run = Run(chosen, data, tmp_path, StageLog(tmp_path), csv, torch.device("cpu"))
    torch.manual_seed(2)
    teacher = SimpleCNN(10, widths=(8, 16)).eval()
    engines = []
    given = Run.teacher_engine
    monkeypatch.setattr(
        Run, "teacher_engine", lambda self, net: engines.append(given(self, net)) or engines[-1]
    )
    source, views = run.teacher_source(teacher, "a" * 64, data.sets["train"])
    assert isinstance(engines[0], OpenVinoNet) and views == (2 if cached else 0)
    batches = list(run.training_loader("t", replayed=views))
    assert sum(len(batch.labels) for batch in batches) == len(data.sets["train"])
    for batch in batches:
        with torch.no_grad():
            wanted = teacher(batch.images)
        found = source(batch)
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def config(**changes):
    keys = {k.replace("__", "."): v for k, v in (ENGINE | changes).items()}
    return load_config(None, (), overrides=keys)


def test_what_it_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda _name: object())
    check_config(config())
    with pytest.raises(UsageError, match="apprentice_a trains its teacher: expected .*=torch"):
        check_config(config(distillation__mode="apprentice_a"))
    with pytest.raises(UsageError, match="mode labels has no teacher"):
        check_config(config(distillation__mode="labels"))
    with pytest.raises(UsageError, match="one of torch, openvino"):
        config(distillation__teacher_engine="onnx")
    check_engine_device(config(), torch.device("cpu"))
    check_engine_device(config(distillation__teacher_engine="torch"), torch.device("cuda"))
    with pytest.raises(UsageError, match=r"computes on the CPU, this run on cuda:1: expected"):
        check_engine_device(config(), torch.device("cuda:1"))


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch, words, command):
    monkeypatch.setattr(config_module, "find_spec", lambda _name: None)
    done = command(*words(tmp_path / "run", **ENGINE))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "openvino, which is not installed: expected" in done.err and "pip install" in done.err
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"not installed.*pip install '\./packages/mpkd"):
        OpenVinoNet(torch.nn.Identity(), image_size=8, threads=1)
