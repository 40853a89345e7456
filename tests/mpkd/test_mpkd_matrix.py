"""The matrix: every cell, its numbers against the files, resume by cell, refusals."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from mpkd import reproduce
from mpkd.experiments import bench, matrix_page
from mpkd.experiments.matrix import PRECISIONS, cell_name, column_settings, columns
from mpkd.experiments.recipes import Setting
from mpkd.utils.common import load_net
from shared_core.runs import read_result
from shared_core.trials import Cell

TINY = {
    "dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160,
    "dataset.workers": 0, "experiment.epochs": 1, "experiment.batch_size": 32,
    "model.student_widths": [8, 16], "model.teacher_model": "simple_cnn", "teacher.epochs": 4,
    "teacher.learning_rate": 0.01, "distillation.views": 1, "quantization.epochs": 1,
    "quantization.calib_samples": 64, "quantization.candidates": [2, 3, 4],
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    setting = {key: Setting(TINY, threads=1) for key in reproduce.MATRIX}
    monkeypatch.setattr(reproduce, "MATRIX", setting)
    monkeypatch.setattr(matrix_page, "TEMPERATURES", (4.0,))


def results(folder):
    """By cell's folder: its result."""
    return {
        p.parent.name: json.loads(p.read_text())["result"] for p in folder.glob("cells/*/cell.json")
    }


def place(precision: str, column: str, seed: int) -> str:
    return Cell(cell_name(precision, column), {}, seed).folder_name


def test_a_matrix_is_stopped_resumed_and_reported(tmp_path, tiny, monkeypatch, command):
    folder = tmp_path / "m"
    words = ("cifar10", "--scale", "rehearsal", "--output", folder, "--seeds", 0, 1)
    measure, made = bench.Bench.measure, []

    def stopping(self, cell, work):
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(cell.name)
        return measure(self, cell, work)

    with monkeypatch.context() as patch:
        patch.setattr(bench.Bench, "measure", stopping)
        assert command(*words, entry=reproduce.main).code == 130
    before = results(folder)
    assert len(before) == 9 and "teacher-s0" in before
    done = command(*words, entry=reproduce.main)
    assert done.code == 1 and "already holds a run" in done.err
    done = command(*words, "--continue", entry=reproduce.main)
    assert done.code == 0, done.err
    after = results(folder)
    assert {k: after[k] for k in before} == before  # no cell was made twice
    record = read_result(folder / "result.json")
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    table = record["measured"]["table"]
    assert list(table) == list(PRECISIONS) and list(table["fp32"]) == ["labels", "KD T=4"]
    for precision in PRECISIONS:
        runs = [after[place(precision, "KD T=4", s)]["test_accuracy"] for s in (0, 1)]
        found = table[precision]["KD T=4"]["test_accuracy"]
        assert found["mean"] == pytest.approx(statistics.fmean(runs))
        assert found["std"] == pytest.approx(statistics.stdev(runs))
    assert table["mixed 3 bits"]["labels"]["mean_bits"]["mean"] <= 3.0
    assert table["int8 PTQ"]["labels"]["mean_bits"]["mean"] == 8.0
    assert table["2 bits"]["labels"]["bytes"]["mean"] < table["int8 PTQ"]["labels"]["bytes"]["mean"]
    own = folder / "cells" / place("2 bits", "labels", 1) / "run" / "checkpoints"
    size = (own / "student_packed.safetensors").stat().st_size  # counted on disk
    assert after[place("2 bits", "labels", 1)]["bytes"] == size
    own = folder / "cells" / place("fp32", "KD T=4", 1) / "run" / "checkpoints"
    _, facts = load_net(own / "student.pth")
    assert facts["metrics"]["test_accuracy"] == after[place("fp32", "KD T=4", 1)]["test_accuracy"]
    text = (folder / "report.md").read_text()
    assert "REHEARSAL" in text and "| fp32 |" in text and "paired by seed" in text
    assert "ternary" in text
    assert set(record["measured"]["ms"]) == {
        "torch fp32", "ONNX Runtime fp32", "ONNX Runtime int8"
    }  # fmt: skip
    last, first = done.out.splitlines()[-1], text.split("\n\n")[1]
    gaps = [
        after[place("fp32", "KD T=4", s)]["test_accuracy"]
        - after[place("fp32", "labels", s)]["test_accuracy"]
        for s in (0, 1)
    ]
    said = f"{100 * statistics.fmean(gaps):+.1f} points (95 % interval"
    plain = f"plain features, linear ({after['floor-s0']['accuracy']:.4f})"
    for line in (last, first):
        assert "REHEARSAL" in line and "Distillation" in line and said in line and plain in line


def test_parts_of_a_job_array_make_one_matrix(tmp_path, tiny, command):
    """Two shards with a folder each, then a third command takes their cells over."""
    parts = [tmp_path / "one", tmp_path / "two"]
    words = ("cifar10", "--scale", "rehearsal", "--seeds", 0)
    for number, folder in enumerate(parts, 1):
        done = command(*words, "--output", folder, "--shard", f"{number}/2", entry=reproduce.main)
        assert done.code == 0 and "are not done here" in done.out, done.err
        assert not (folder / "result.json").exists()
    done = command(*words, "--output", parts[0], "--merge", parts[1], "--continue",
                   entry=reproduce.main)  # fmt: skip
    assert done.code == 0, done.err
    whole = read_result(parts[0] / "result.json")["measured"]["cells"]
    alone = [{k: v for k, v in results(f).items() if "-s" in k and " " not in k} for f in parts]
    assert len(whole) == 14 and len(set(alone[0]) | set(alone[1])) >= 15


def test_a_row_that_is_only_emulated_is_left_out_by_name(tmp_path, tiny, monkeypatch, command):
    reason = {"bf16": "this hardware only emulates it"}
    words = ("cifar10", "--scale", "rehearsal", "--output", tmp_path / "m", "--seeds", 0)
    with monkeypatch.context() as patch:
        patch.setattr(matrix_page, "rows_left_out", lambda **_: reason)
        done = command(*words, entry=reproduce.main)
    assert done.code == 0, done.err
    measured = read_result(tmp_path / "m" / "result.json")["measured"]
    assert measured["left_out"] == reason
    assert list(measured["table"]) == [row for row in PRECISIONS if row != "bf16"]
    said = "bf16 was left out: this hardware only emulates it."
    assert said in (tmp_path / "m" / "report.md").read_text()
    before = results(tmp_path / "m")
    done = command(*words, "--continue", entry=reproduce.main)  # later it is trained after all
    assert done.code == 0, done.err
    after = results(tmp_path / "m")
    assert {k: after[k] for k in before} == before
    assert {name.partition("-")[0] for name in set(after) - set(before)} == {"bf16"}
    assert read_result(tmp_path / "m" / "result.json")["measured"]["left_out"] == {}


def test_bf16_is_left_out_where_it_is_emulated_and_not_asked_for(monkeypatch):
    def rows(scale="short", *, native, emulate=False):
        monkeypatch.setattr(matrix_page, "computes_bf16", lambda device: native)
        device = torch.device("cpu")
        return list(matrix_page.rows_left_out(emulate=emulate, scale=scale, device=device))

    assert rows(native=False) == ["bf16"]
    assert rows(native=False, emulate=True) == []
    assert rows(native=True) == []
    assert rows("rehearsal", native=False) == []


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
        (["cifar10", "--seeds", "1", "1"], 2, "different numbers"),
        (["cifar10", "--threads", "0"], 2, "--threads"),
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


def test_auto_takes_what_is_there(tmp_path, monkeypatch, command):
    asked = []
    monkeypatch.setattr(matrix_page, "run_sweep", lambda options, **_: asked.append(options) or 0)
    words = ("cifar10", "--data-root", tmp_path)
    assert command(*words, entry=reproduce.main).code == 0 and asked[0].scale == "rehearsal"
    (tmp_path / "CIFAR10").mkdir()
    assert command(*words, entry=reproduce.main).code == 0 and asked[1].scale == "full"
    assert asked[1].config["dataset.name"] == "cifar10"
    assert str(asked[1].output).endswith("cifar10-full")
