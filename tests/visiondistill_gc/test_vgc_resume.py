"""kill -9 in any fold, the same command with --resume: bit for bit the run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shared_core.runs import read_metrics, read_result

# Three folds, a state after every step, everything random switched on.
THREE = (
    *("--n-splits", "3", "--save-every", "1", "--ema", "0.9", "--crop-scale", "0.5", "1.0"),
    *("--mixup", "0.4", "--label-smoothing", "0.1", "--no-visualdl"),
)


def in_stage(folder: Path, stage: str, saves: int) -> Callable[[float], bool]:
    """Kill in ``stage`` when its state was written ``saves`` times."""
    state, seen = folder / "state" / f"{stage}.pdparams", []

    def kill(seconds: float) -> bool:
        try:
            stamp = state.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if not seen or seen[-1] != stamp:
            seen.append(stamp)
        return len(seen) >= saves

    return kill


@pytest.mark.slow
def test_killed_in_the_third_fold_and_elsewhere(tmp_path, server, tiny):
    whole, folder = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    for path in (whole, folder):
        path.parent.mkdir()
    out = tmp_path / "out.txt"
    assert server.run(tiny(whole, *THREE), out=out) == 0, out.read_text()
    said, kills = [], 0
    for stage, saves in (("teacher1", 2), ("fold1", 1), ("fold2", 2), ("fold2", 1)):
        more = ["--resume"] if (folder / "config.json").exists() else []
        kill = in_stage(folder, stage, saves)
        code = server.run(tiny(folder, *THREE, *more), out=out, kill=kill)
        kills += code == -9
        said.append(out.read_text())
    assert kills >= 3
    assert server.run(tiny(folder, *THREE, "--resume"), out=out) == 0, out.read_text()
    said.append(out.read_text())
    assert any("fold2: resumed" in text for text in said)
    for fold in range(3):
        for name in (f"best_model_fold{fold}.pdparams", f"teacher_fold{fold}.pdparams"):
            own = (folder / "models_saved" / name).read_bytes()
            assert own == (whole / "models_saved" / name).read_bytes(), name
    log = (folder / "metrics.jsonl").read_bytes()
    assert log == (whole / "metrics.jsonl").read_bytes()
    a, b = (read_result(path / "result.json")["measured"] for path in (whole, folder))
    assert a == b
    assert not list((folder / "state").glob("*.pdparams"))


def test_resume_manners(tmp_path, tiny, command):
    folder = tmp_path / "run"
    done = command(*tiny(folder, "--resume"))
    assert done.code == 1 and "nothing to resume" in done.err and not folder.exists()
    words = ("--no-visualdl", "--stage", "prepare")
    assert command(*tiny(folder), *words).code == 0
    done = command(*tiny(folder), "--no-visualdl")
    assert done.code == 1 and "already holds a run" in done.err
    for flag in (("--seed", "7"), ("--temperature", "5"), ("--split-seed", "3")):
        done = command(*tiny(folder), *words, "--resume", *flag)
        assert done.code == 1 and done.err.startswith("error: cannot resume")
    done = command(*tiny(folder), *words, "--continue")
    assert done.code == 0 and "prepare: done before" in done.out
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "work.txt").write_text("years")
    done = command(*tiny(tmp_path / "thesis"), "--fresh")
    assert done.code == 2 and (tmp_path / "thesis" / "work.txt").exists()
    lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    assert lines == []
