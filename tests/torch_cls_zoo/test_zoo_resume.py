"""kill -9 at any moment, the same command with --resume: bit for bit the run that never stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from shared_core.runs import read_result

# Everything that draws, counts or keeps a state of its own.
EVERYTHING = (
    *("--save_every", "2", "--aug", "--mixup", "--mixup_ratio", "0.8", "--cutmix"),
    *("--accumulate", "2", "--ema", "0.9", "--balanced", "--erasing", "0.5", "--quarter_turns"),
    *("--multi_scale", "--criterion", "bce", "--ghm_loss", "--ohm_loss", "--opt", "lookaheadadam"),
    *("--sparsity", "--amp", "bf16", "--bias_prior", "data"),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, zoo_server, zoo_words) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    code = zoo_server.run(zoo_words(folder, *EVERYTHING), out=folder.parent / "out.txt")
    assert code == 0, (folder.parent / "out.txt").read_text()
    return folder


def at_saves(folder: Path, number: int):
    """Kill when the state was written ``number`` times in this process."""
    state, seen = folder / "state" / "train.pth", []

    def kill(seconds: float) -> bool:
        try:
            stamp = state.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if not seen or seen[-1] != stamp:
            seen.append(stamp)
        return len(seen) >= number

    return kill


def story(server, words: list[str], folder: Path, kills: list) -> str:
    """Start, kill, resume ... and let it end; what the last process said."""
    for number, kill in enumerate([*kills, None]):
        out = folder.parent / f"out{number}.txt"
        resume = ["--resume"] if (folder / "config.json").exists() else []
        code = server.run([*words, *resume], out=out, kill=kill)
        assert code in (0, -9), out.read_text()
        if code == 0:
            break
    return out.read_text()


def assert_same(mine: Path, theirs: Path, digests) -> None:
    assert digests(mine) == digests(theirs)
    one, other = (read_result(folder / "result.json")["measured"] for folder in (mine, theirs))
    assert one["test"] == other["test"]
    for name in ("misclassified.csv", "per_class.csv"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()


def test_two_runs_are_the_same(reference, zoo_server, zoo_words, zoo_digests, tmp_path):
    story(zoo_server, zoo_words(tmp_path / "run", *EVERYTHING), tmp_path / "run", [])
    assert_same(tmp_path / "run", reference, zoo_digests)


def test_killed_in_the_middle_of_epochs(reference, zoo_server, zoo_words, zoo_digests, tmp_path):
    run = tmp_path / "run"
    kills = [at_saves(run, 1), at_saves(run, 3)]  # each is after two batches of three
    said = story(zoo_server, zoo_words(run, *EVERYTHING), run, kills)
    assert "going on at epoch" in said and ", batch 3" in said
    assert_same(run, reference, zoo_digests)


@pytest.mark.slow
def test_killed_at_random_moments(reference, zoo_server, zoo_words, zoo_digests, tmp_path):
    rng = random.Random(7)
    run = tmp_path / "run"
    kills = []
    for _ in range(5):
        wait = rng.uniform(0.3, 2.5)
        kills.append(lambda seconds, wait=wait: seconds > wait)
    story(zoo_server, zoo_words(run, *EVERYTHING), run, kills)
    assert_same(run, reference, zoo_digests)


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    reference, zoo_server, zoo_words, zoo_digests, tmp_path
):
    before = zoo_digests(reference)
    out = tmp_path / "out.txt"
    assert zoo_server.run([*zoo_words(reference, *EVERYTHING), "--resume"], out=out) == 0
    assert zoo_digests(reference) == before


def test_a_resumed_run_may_not_change_what_decides_it(zoo_trained, zoo_words, zoo_command):
    done = zoo_command(*zoo_words(zoo_trained[0], "--lr", "0.5", "--epochs", 6, "--resume"))
    assert done.code == 1 and "it was started with lr=" in done.err and done.err.count("\n") == 1


def test_a_resumed_run_knows_its_own_options(zoo_trained, zoo_data, zoo_command, zoo_digests):
    """Only --resume FOLDER: everything else is as the run began."""
    before = zoo_digests(zoo_trained[0])
    done = zoo_command("--train", "--resume", zoo_trained[0], "--no-cuda")
    assert done.code == 0, done.err
    assert zoo_digests(zoo_trained[0]) == before


def test_nothing_to_resume_and_fresh(zoo_words, zoo_command, tmp_path):
    done = zoo_command(*zoo_words(tmp_path / "run"), "--resume")
    assert done.code == 1 and "holds no run" in done.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = zoo_command(*zoo_words(tmp_path / "mine"), "--fresh")
    assert done.code == 2 and (tmp_path / "mine" / "letter.txt").exists()


def test_the_state_counts_every_batch(reference):
    from shared_core.for_torch.checkpoints import _read

    counters = json.loads(_read(reference / "state" / "train.pth")["counters"])
    assert counters["epoch"] == 3 and counters["sums"][0]["batches"] == 0
