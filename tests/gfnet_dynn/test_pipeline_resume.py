"""kill -9 at any moment, the same command with --resume: bit for bit the run that never stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gfnet_dynn.model_files import load_model
from shared_core.runs import read_metrics, read_result

STAGES = ("prepare", "backbone", "distil", "exits", "evaluate")
EVERYTHING = (
    *("--save-every", "2", "--ema", "0.9", "--mixup", "0.8", "--cutmix", "1.0"),
    *("--drop-path", "0.1", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.3"),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, server, tiny) -> Path:
    """A run with everything random switched on, never stopped."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    code = server.run(tiny(folder, *EVERYTHING), out=folder.parent / "out.txt", figures=False)
    assert code == 0, (folder.parent / "out.txt").read_text()
    return folder


class Story:
    """One run that is killed again and again."""

    def __init__(self, server, words: list[str], folder: Path, *, figures: bool = True) -> None:
        self.server, self.words, self.folder, self.figures = server, words, folder, figures
        self.said: list[str] = []
        self.kills = 0

    def go(self, kill: Callable[[float], bool] | None = None) -> bool:
        """Start or resume; whether it was killed before it ended."""
        out = self.folder.parent / f"out{len(self.said)}.txt"
        resume = ["--resume"] if (self.folder / "config.json").exists() else []
        code = self.server.run([*self.words, *resume], out=out, kill=kill, figures=self.figures)
        self.said.append(out.read_text())
        assert code in (0, -9), self.said[-1]
        self.kills += code == -9
        return code == -9

    def in_stage(self, stage: str, saves: int) -> Callable[[float], bool]:
        """Kill in ``stage`` when its state was written ``saves`` times (0: when it begins)."""
        state, out = self.folder / "state" / f"{stage}.pth", len(self.said)
        said = self.folder.parent / f"out{out}.txt"
        seen: list[int] = []

        def kill(seconds: float) -> bool:
            if saves:
                try:
                    stamp = state.stat().st_mtime_ns
                except FileNotFoundError:
                    return False
                if not seen or seen[-1] != stamp:
                    seen.append(stamp)
                return len(seen) >= saves
            return said.exists() and f"--- {stage}\n" in said.read_text()

        return kill

    def at_random(self, rng: random.Random) -> Callable[[float], bool]:
        """Kill after a random time, or when the metric log has a random size."""
        log = self.folder / "metrics.jsonl"
        size = log.stat().st_size if log.exists() else 0
        if rng.random() < 0.5:
            wait = rng.uniform(0.05, 1.2)
            return lambda seconds: seconds > wait
        more = rng.randint(1, 4000)
        return lambda seconds: log.exists() and log.stat().st_size >= size + more


def assert_equal_runs(mine: Path, theirs: Path, *, digests, without_times) -> None:
    assert digests(mine) == digests(theirs)
    assert (mine / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    a, b = (read_result(folder / "result.json") for folder in (mine, theirs))
    assert without_times(a["measured"]) == without_times(b["measured"])
    assert a["data"] == b["data"]
    assert not list((mine / "state").glob("*.pth"))
    assert not list(mine.rglob(".*.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_once_in_every_stage(tmp_path, server, tiny, finished, digests, without_times, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    story = Story(server, tiny(folder), folder)
    for stage in STAGES:
        saves = {"backbone": 2, "distil": 2, "exits": 4}.get(stage, 0)
        wanted = rng.randint(1, saves) if saves else 0
        story.go(story.in_stage(stage, wanted))
    while story.go():
        pass
    resumed = sum(f"{stage}: resumed at epoch" in text for text in story.said for stage in STAGES)
    assert story.kills >= 4 and resumed >= 2
    assert_equal_runs(folder, finished[0], digests=digests, without_times=without_times)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10])
def test_killed_at_random_moments_with_everything_on(
    tmp_path, server, tiny, reference, digests, without_times, seed
):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    story = Story(server, tiny(folder, *EVERYTHING), folder, figures=False)
    # Certainly in the middle of an epoch: six steps, a state after the second and the fourth.
    story.go(story.in_stage("backbone", 2))
    story.go(story.in_stage("distil", rng.choice([2, 3, 5])))
    for _ in range(3):
        if not story.go(story.at_random(rng)):
            break
    while story.go():
        pass
    assert story.kills >= 3
    assert "step" in "".join(story.said)
    assert_equal_runs(folder, reference, digests=digests, without_times=without_times)


@pytest.mark.parametrize("stage", ["backbone", "distil", "exits"])
def test_stopped_in_an_epoch_it_ends_as_if_it_had_not(
    tmp_path, tiny, command, finished, digests, monkeypatch, no_figures, stage
):
    """In this process: Ctrl-C after some steps, then the same command with --resume."""
    from gfnet_dynn.train import exit_training, finetune

    owner = exit_training.ExitTraining if stage == "exits" else finetune.FineTune
    name = "step" if stage == "exits" else "_step"
    # Six steps an epoch; the student's are the seventh and eighth of twelve.
    step, left = getattr(owner, name), [{"backbone": 8, "distil": 12 + 9, "exits": 15}[stage]]

    def stop(self, *words):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *words)

    words = tiny(tmp_path / "run", "--save-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert command(*words).code == 130
    assert (tmp_path / "run" / "state" / f"{stage}.pth").exists()
    done = command(*words, "--resume")
    assert done.code == 0, done.err
    assert f"{stage}: resumed at epoch 2" in done.out or stage == "exits"
    mine, theirs = (folder / "metrics.jsonl" for folder in (tmp_path / "run", finished[0]))
    assert mine.read_bytes() == theirs.read_bytes()
    sums = [
        {name: load_model(folder / name)[1]["sha256"] for name in files_of(folder)}
        for folder in (tmp_path / "run", finished[0])
    ]
    assert sums[0] == sums[1]


def files_of(folder: Path) -> list[str]:
    found = (folder / "checkpoint").rglob("*.pth")
    return sorted(str(p.relative_to(folder)) for p in found if "_warmup" not in p.parts)


def test_finished_run_resumed_repeats_nothing(
    tmp_path, finished, tiny, command, digests, without_times
):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.glob("[!.]*.json*")}
    models = digests(folder)
    done = command(*tiny(folder, "--resume"))
    assert done.code == 0, done.err
    assert [f"{stage}: done before" in done.out for stage in STAGES] == [True] * 5
    assert {p: p.read_bytes() for p in folder.glob("[!.]*.json*")} == before
    assert digests(folder) == models


def test_continue_starts_and_goes_on(tmp_path, tiny, command):
    folder = tmp_path / "run"
    first = command(*tiny(folder, "--continue", "--stage", "prepare"))
    second = command(*tiny(folder, "--continue", "--stage", "prepare"))
    assert (first.code, second.code) == (0, 0)
    assert "--- prepare" in first.out and "prepare: done before" in second.out


def test_run_is_not_written_over(finished, tiny, command):
    folder, _ = finished
    done = command(*tiny(folder))
    assert done.code == 1 and "already holds a run" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("--lr", "0.5"), "lr="),
        (("--seed", "7"), "seed="),
        (("--split-seed", "7"), "split_seed="),
        (("--ce_ic_tradeoff", "0.5"), "ce_ic_tradeoff="),
    ],
)
def test_resume_with_another_value_is_refused(finished, tiny, command, words, key):
    folder, _ = finished
    before = (folder / "config.json").read_bytes()
    done = command(*tiny(folder, "--resume", *words))
    assert done.code == 1
    assert done.err.startswith("error: cannot resume") and key in done.err
    assert done.err.count("\n") == 1
    assert (folder / "config.json").read_bytes() == before


def test_resume_on_nothing(tmp_path, tiny, command):
    done = command(*tiny(tmp_path / "none", "--resume"))
    assert done.code == 1 and "nothing to resume" in done.err
    assert not (tmp_path / "none").exists()


def test_fresh_replaces_a_run_and_nothing_else(tmp_path, tiny, command):
    folder = tmp_path / "run"
    assert command(*tiny(folder, "--stage", "prepare")).code == 0
    (folder / "stages.json").write_text("{}")
    (folder / "note.txt").write_text("old")
    assert command(*tiny(folder, "--fresh", "--stage", "prepare")).code == 0
    assert not (folder / "note.txt").exists()

    for name, content in (("thesis.txt", "years of work"), ("config.json", '{"model": "bert"}')):
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).write_text(content)
        done = command(*tiny(other, "--fresh"))
        assert done.code == 2 and "nothing deleted" in done.err
        assert (other / name).read_text() == content
    # Words that are refused delete nothing either.
    done = command(*tiny(folder, "--fresh", "--exits", "2,1"))
    assert done.code == 2 and (folder / "split.json").exists()


def test_changed_split_is_refused(tmp_path, tiny, command):
    folder = tmp_path / "run"
    assert command(*tiny(folder, "--stage", "prepare")).code == 0
    split = json.loads((folder / "split.json").read_text())
    split["samples"][0][3] = "test" if split["samples"][0][3] != "test" else "train"
    (folder / "split.json").write_text(json.dumps(split))
    done = command(*tiny(folder, "--resume"))
    assert done.code == 1 and "was changed" in done.err


def test_metrics_of_a_killed_try_are_dropped(finished):
    """The log of a whole run has every epoch once."""
    folder, _ = finished
    lines = read_metrics(folder / "metrics.jsonl")
    kinds = [(line["stage"], line["split"], line["step"]) for line in lines]
    assert len(kinds) == len(set(kinds))
