"""Stopped and resumed equals never stopped, bit for bit, in every mode of training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mpkd import options, stages
from mpkd.trainer import trainer as trainer_module
from mpkd.trainer.metrics_logger import read_metrics_csv

BF16 = {"mixed_precision__enabled": "true", "mixed_precision__dtype": "bf16"}
FP16 = {
    "mixed_precision__enabled": "true", "mixed_precision__dtype": "fp16",
    "training__gradient_accumulation_steps": 2, "training__clip": 1.0, "training__ema": 0.9,
    "training__lr_warmup_steps": 3, "mixed_precision__growth_interval": 2,
}  # fmt: skip
QAT = {"quantization__method": "qat", "quantization__w_bits": 3, "quantization__epochs": 2}
SDQ = {"quantization__method": "sdq", "quantization__epochs": 2,
       "quantization__compare_uniform": "false", "quantization__budget": 4.0}  # fmt: skip
# Settings, and after how many saves each try is stopped.
MODES = {
    "fp16 with everything": (FP16, (2, 1)),
    "apprentice_a": ({"distillation__mode": "apprentice_a", **QAT}, (2, 2)),
    "apprentice_c": ({"distillation__mode": "apprentice_c", **QAT}, (2, 2)),
    "adapters": (
        {"teacher__mode": "lora", "lora__target": "student", "lora__dropout": 0.2}, (2, 2)
    ),
    "qat": ({**QAT, **FP16}, (3, 1, 1)),
    "teacher_only": ({}, (2, 2)),
    "bf16": (BF16, (2, 2)),
    "live teacher": ({"distillation__cache_teacher_logits": "false"}, (2, 2)),
    "labels": ({"distillation__mode": "labels", "training__lr_scheduler": "step"}, (2, 2)),
    "mixed": ({"distillation__mode": "mixed"}, (2, 2)),
    "apprentice_b": ({"distillation__mode": "apprentice_b", **QAT}, (2, 2)),
    "sdq": (SDQ, (2, 5, 2)),
}  # fmt: skip


class Stopped(Exception):
    """The process ends here."""


def interrupt(monkeypatch, after: int) -> None:
    """From now on the process ends right after it wrote its state for the ``after``-th time."""
    save = trainer_module.StageState.save
    saves = []

    def saving(self, **counters):
        save(self, **counters)
        saves.append(1)
        if len(saves) == after:
            raise Stopped

    monkeypatch.setattr(trainer_module.StageState, "save", saving)


def without_seconds(folder):
    (csv,) = (folder / "logs").glob("*.csv")
    rows = read_metrics_csv(csv)
    return [{k: v for k, v in row.items() if k not in ("seconds", "run_id")} for row in rows]


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_in_the_middle_of_an_epoch(
    tmp_path, monkeypatch, words, command, teacher_file, digests, mode
):
    more, stops = MODES[mode]
    changes = {"model__teacher_ckpt": teacher_file, "logging__log_interval": 2} | more
    monkeypatch.setattr(options, "STAGES", options.STAGES[:4])  # to the quantized student
    if mode == "apprentice_a":
        changes["model__teacher_ckpt"] = ""
    given = stages.settings_from
    monkeypatch.setattr(
        stages, "settings_from",
        lambda *a, **more: replace(given(*a, **more), save_seconds=0.0),
    )  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = command(*words(whole, **changes))
    assert done.code == 0, done.err
    for after in stops:
        with monkeypatch.context() as stopping, pytest.raises(Stopped):
            interrupt(stopping, after)
            command(*words(part, "--continue", **changes))
    done = command(*words(part, "--resume", **changes))
    assert done.code == 0, done.err
    if mode in ("qat", "sdq"):  # the last stop was within the training with few bits
        assert "quantize-qat: resumed at epoch 2" in done.out
    assert "resumed at epoch" in done.out or "trained before" in done.out
    assert digests(part) == digests(whole)
    assert without_seconds(part) == without_seconds(whole)
    assert (part / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not list((part / "state").glob("*.pth"))


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, server, words, teacher_file, digests):
    """kill -9 while states, outputs and checkpoints are being written."""
    changes = {"model__teacher_ckpt": teacher_file, "quantization__method": "ptq"}
    changes |= {"experiment__epochs": 3, "export__onnx": "false"}
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert server.run(words(whole, **changes), out=tmp_path / "whole.txt") == 0
    kills = 0

    def at_size(path, size):
        return lambda _seconds: path.exists() and path.stat().st_size >= size

    moments = [
        at_size(part / "knowledge" / "values.bin", 4000),
        at_size(part / "metrics.jsonl", 500),
        at_size(part / "checkpoints" / "student.pth", 1),
    ]
    for number, moment in enumerate(moments):
        out = tmp_path / f"out{number}.txt"
        code = server.run(words(part, "--continue", **changes), out=out, kill=moment)
        assert code in (-9, 0), out.read_text()
        kills += code == -9
    out = tmp_path / "last.txt"
    assert server.run(words(part, "--continue", **changes), out=out) == 0, out.read_text()
    assert kills >= 2
    assert digests(part) == digests(whole)
    assert without_seconds(part) == without_seconds(whole)


def test_a_finished_run_repeats_nothing_and_is_not_written_over(finished, words, command):
    folder, _ = finished
    teacher = {"quantization__method": "ptq", "export__tensorrt": "true"}
    teacher["model__teacher_ckpt"] = json.loads((folder / "config.json").read_text())[
        "model.teacher_ckpt"
    ]
    before = (folder / "stages.json").read_bytes()
    done = command(*words(folder, "--resume", **teacher))
    assert done.code == 0, done.err
    assert done.out.count("done before") == 6
    assert (folder / "stages.json").read_bytes() == before
    done = command(*words(folder, **teacher))
    assert done.code == 1 and "already holds a run" in done.err
    done = command(*words(folder, "--resume", **teacher, experiment__seed=3))
    assert done.code == 1 and "experiment.seed" in done.err


def test_fresh_replaces_a_run_and_nothing_else(tmp_path, words, command):
    folder = tmp_path / "run"
    assert command(*words(folder, "--stage", "prepare")).code == 0
    (folder / "note.txt").write_text("old")
    assert command(*words(folder, "--fresh", "--stage", "prepare")).code == 0
    assert not (folder / "note.txt").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    done = command(*words(other, "--fresh"))
    assert done.code == 2 and "nothing deleted" in done.err and (other / "thesis.txt").exists()
