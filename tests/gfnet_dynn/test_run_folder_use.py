"""Two processes in one folder, images that were moved, and what an evaluation writes down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.model_files import load_model
from shared_core.metrics import ece
from shared_core.runs import read_result
from shared_core.runs.lock import LOCK_FILE, RunLock

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from shared_core.runs import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_a_dead_ones_lock_taken_over(tmp_path):
    path = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid}: expected"):
            with RunLock(tmp_path):
                pass
        assert (tmp_path / LOCK_FILE).exists()  # the refusal took nothing away
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().split() == [str(os.getpid())]
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            with RunLock(tmp_path):
                pass
    assert not list(tmp_path.iterdir())


def test_a_run_in_use_is_left_alone(tiny, command, copy_of, tmp_path):
    folder = copy_of(tmp_path / "run")
    before = (folder / "result.json").read_bytes()
    with RunLock(folder):
        for words in (("--eval",), ("--resume",), ("--fresh",)):
            done = command(*tiny(folder, *words))
            assert done.code == 1 and "is in use by process" in done.err
    assert (folder / "result.json").read_bytes() == before


def test_resume_after_the_images_were_moved(tiny, command, folder_of_images, tmp_path, no_figures):
    def words(output, root, *more):
        kept = tiny(output, *more, "--data-path", str(root), "--data-set", "mine")
        for flag in ("--builtin-classes", "--builtin-images"):
            at = kept.index(flag)
            del kept[at : at + 2]
        return kept

    here = folder_of_images(tmp_path / "here")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert command(*words(whole, here)).code == 0
    assert command(*words(parted, here, "--stage", "prepare")).code == 0
    assert command(*words(parted, here, "--stage", "backbone")).code == 0
    there = tmp_path / "somewhere else" / "images"
    there.parent.mkdir()
    shutil.move(here, there)
    done = command(*words(parted, there, "--resume"))
    assert done.code == 0, done.err
    # The files' facts name the folder, the numbers must not know of it.
    assert (parted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    a, b = (read_result(one / "result.json") for one in (parted, whole))
    assert a["data"]["split_hash"] == b["data"]["split_hash"]
    assert a["measured"]["student"]["accuracy"] == b["measured"]["student"]["accuracy"]
    # Another image under the same name is another data set.
    (there / "a" / "000.png").write_bytes((there / "b" / "000.png").read_bytes())
    done = command(*words(parted, there, "--eval"))
    assert done.code == 1 and "000.png is another image than the one" in done.err
    # Built-in scenes in their place are refused, too.
    done = command(*tiny(parted, "--eval"))
    assert done.code == 1 and "cannot resume" in done.err


def test_record_names_the_model_and_every_exit(finished):
    folder, done = finished
    exits = read_result(folder / "result.json")["measured"]["exits"]
    file = folder / "checkpoint" / "best" / exits["model"]["file"]
    _, facts = load_model(file)
    assert exits["model"] == {"file": file.name, "sha256": facts["sha256"]}
    test = ExitLogits.load(folder / "outputs-test.npz")
    probabilities = np.exp(test.logits[1] / exits["temperatures"][1])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    row = exits["points"]["balanced"]["exits"][1]
    expected = ece(probabilities.astype(np.float64), test.labels, scheme="mass")
    assert row["ece"] == pytest.approx(expected, abs=1e-6)
    assert row["accuracy_all"] == (test.logits[1].argmax(1) == test.labels).mean()
    for times in exits["ms_per_image_at_exits"].values():
        assert len(times) == 4 and min(times) > 0
    assert {row["kind"] for row in exits["budgets"]} == {"gate"} and len(exits["budgets"]) == 6
    assert {row["alpha"] for row in exits["conformal"]} == {0.01, 0.05, 0.1}
    assert exits["risk"]
    for text in ("balanced, exit 1: ", "ECE 0.", "budget 70.0 %, gate: ", "conformal, alpha 0.05"):
        assert text in done.out


def test_a_model_of_another_split_warns(tiny_on_file, command, finished, tmp_path, no_figures):
    best = next((finished[0] / "checkpoint/best").glob("*.pth"))
    same = command(*tiny_on_file(tmp_path / "same", "--eval", "--checkpoint-path", str(best)))
    assert same.code == 0 and "warning" not in same.err
    words = ("--eval", "--checkpoint-path", str(best), "--split-seed", "1")
    other = command(*tiny_on_file(tmp_path / "other", *words))
    assert other.code == 0 and f"warning: {best} was trained on split" in other.err
    model = read_result(tmp_path / "other/result.json")["measured"]["exits"]["model"]
    assert model["split_of_model"] == load_model(best)[1]["split_hash"]
