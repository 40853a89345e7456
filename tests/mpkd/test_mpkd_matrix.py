"""The matrix: every cell, its numbers against the files, resume by cell, refusals."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from mpkd import matrix as matrix_module
from mpkd import reproduce, reproduction
from mpkd.matrix import PRECISIONS, cell_name, column_settings, columns
from mpkd.recipes import Setting
from mpkd.utils.common import load_net
from shared_core.runs import read_result

TINY = {
    "dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160,
    "dataset.workers": 0, "experiment.epochs": 1, "experiment.batch_size": 32,
    "model.student_widths": [8, 16], "model.teacher_model": "simple_cnn", "teacher.epochs": 4,
    "teacher.learning_rate": 0.01, "distillation.views": 1, "quantization.epochs": 1,
    "quantization.calib_samples": 64, "quantization.candidates": [2, 3, 4],
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    setting = {key: Setting(TINY, threads=1) for key in reproduction.MATRIX}
    monkeypatch.setattr(reproduction, "MATRIX", setting)
    monkeypatch.setattr(reproduction, "TEMPERATURES", (4.0,))
    monkeypatch.setattr(
        reproduction, "latencies", lambda run, file: matrix_module.latencies(run, file, repeats=2)
    )


@pytest.mark.slow
def test_a_matrix_is_stopped_resumed_and_reported(tmp_path, tiny, monkeypatch, command):
    folder = tmp_path / "m"
    words = ("cifar10", "--scale", "rehearsal", "--output", folder, "--seeds", 0, 1)
    cell = matrix_module.Matrix.cell
    done_cells = []

    def stopping(self, *which):
        if len(done_cells) == 9:
            raise KeyboardInterrupt
        done_cells.append(which)
        return cell(self, *which)

    with monkeypatch.context() as patch:
        patch.setattr(matrix_module.Matrix, "cell", stopping)
        assert command(*words, entry=reproduce.main).code == 130
    before = json.loads((folder / "stages.json").read_text())
    assert sum(" | " in name for name in before) == 9
    done = command(*words, entry=reproduce.main)
    assert done.code == 1 and "already holds a run" in done.err
    done = command(*words, "--continue", entry=reproduce.main)
    assert done.code == 0, done.err
    after = json.loads((folder / "stages.json").read_text())
    assert {k: after[k] for k in before} == before  # no cell was made twice
    record = read_result(folder / "result.json")
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    table = record["measured"]["table"]
    assert list(table) == list(PRECISIONS) and list(table["fp32"]) == ["labels", "KD T=4"]
    for precision in PRECISIONS:
        runs = [after[cell_name(precision, "KD T=4", s)]["test_accuracy"] for s in (0, 1)]
        found = table[precision]["KD T=4"]["test_accuracy"]
        assert found["mean"] == pytest.approx(statistics.fmean(runs))
        assert found["std"] == pytest.approx(statistics.stdev(runs))
    assert table["mixed 3 bits"]["labels"]["mean_bits"]["mean"] <= 3.0
    assert table["int8 PTQ"]["labels"]["mean_bits"]["mean"] == 8.0
    assert table["2 bits"]["labels"]["bytes"]["mean"] < table["int8 PTQ"]["labels"]["bytes"]["mean"]
    _, facts = load_net(folder / "checkpoints" / "fp32-KD_T4-1.pth")
    cell_of = after[cell_name("fp32", "KD T=4", 1)]
    assert facts["metrics"]["test_accuracy"] == cell_of["test_accuracy"]
    text = (folder / "report.md").read_text()
    assert "REHEARSAL" in text and "| fp32 |" in text and "paired by seed" in text
    assert set(record["measured"]["ms"]) == {
        "torch fp32", "ONNX Runtime fp32", "ONNX Runtime int8"
    }  # fmt: skip
    assert done.out.splitlines()[-1].startswith("REHEARSAL")


def test_a_row_that_is_only_emulated_is_left_out_by_name(tmp_path, tiny, monkeypatch, command):
    reason = {"bf16": "this hardware only emulates it"}
    words = ("cifar10", "--scale", "rehearsal", "--output", tmp_path / "m", "--seeds", 0)
    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "rows_left_out", lambda args, device: reason)
        done = command(*words, entry=reproduce.main)
    assert done.code == 0, done.err
    measured = read_result(tmp_path / "m" / "result.json")["measured"]
    assert measured["left_out"] == reason
    assert list(measured["table"]) == [row for row in PRECISIONS if row != "bf16"]
    said = "bf16 was left out: this hardware only emulates it."
    assert said in (tmp_path / "m" / "report.md").read_text()
    before = json.loads((tmp_path / "m" / "stages.json").read_text())
    done = command(*words, "--continue", entry=reproduce.main)  # later it is trained after all
    assert done.code == 0, done.err
    after = json.loads((tmp_path / "m" / "stages.json").read_text())
    assert {k: after[k] for k in before} == before
    assert {name.partition(" | ")[0] for name in set(after) - set(before)} == {"bf16"}
    assert read_result(tmp_path / "m" / "result.json")["measured"]["left_out"] == {}


def test_bf16_is_left_out_where_it_is_emulated_and_not_asked_for(tmp_path, monkeypatch):
    def rows(*words, native):
        args, _, _ = reproduction.parse(["cifar10", "--data-root", str(tmp_path), *words])
        monkeypatch.setattr(reproduction, "computes_bf16", lambda device: native)
        return list(reproduction.rows_left_out(args, torch.device("cpu")))

    assert rows("--scale", "short", native=False) == ["bf16"]
    assert rows("--scale", "short", "--emulate-bf16", native=False) == []
    assert rows("--scale", "short", native=True) == []
    assert rows("--scale", "rehearsal", native=False) == []


def test_columns_and_cells():
    assert columns() == ["labels", "KD T=1", "KD T=2", "KD T=4"]
    assert column_settings("KD T=2") == {
        "distillation.mode": "teacher_only", "distillation.temperature": 2.0
    }  # fmt: skip
    assert column_settings("labels") == {"distillation.mode": "labels"}


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["mnist"], 2, "invalid choice"),
        (["cifar10", "--fresh", "--continue"], 2, "expected one of them"),
        (["cifar10", "--seeds", "1", "1"], 2, "different ones"),
        (["cifar10", "--threads", "0"], 2, "1 or more"),
        (["cifar10", "--data-path", "none"], 1, "there is nothing"),
        (["cifar10", "--scale", "rehearsal", "--data-path", "."], 2, "expected no --data-path"),
        (["cifar10", "--scale", "short"], 1, "CIFAR-10 is not at"),
        (["imagenet", "--scale", "full"], 1, "ImageNet is not at"),
        (["cifar10", "--set", "experiment.epoch=1"], 2, "perhaps experiment.epochs"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, command, argv, code, said):
    monkeypatch.chdir(tmp_path)
    done = command(*argv, entry=reproduce.main)
    assert done.code == code and said in done.err


def test_auto_takes_what_is_there(tmp_path):
    parse = reproduction.parse
    assert parse(["cifar10", "--data-root", str(tmp_path)])[0].scale == "rehearsal"
    (tmp_path / "CIFAR10").mkdir()
    args, config, _ = parse(["cifar10", "--data-root", str(tmp_path)])
    assert args.scale == "full" and config["dataset.name"] == "cifar10"
    assert str(args.output).endswith("cifar10-full")
