"""The reproduction on tiny scenes: its cells, its record and report, going on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from landmark_distill import session
from landmark_distill.config import DrawnScenes
from landmark_distill.images.truths import folder_labels
from landmark_distill.judging.verification import verification_rates
from landmark_distill.parsing import parse
from landmark_distill.reproducing.report_page import verdicts
from landmark_distill.reproducing.settings import ARMS, SETTINGS, Setting, words
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import read_result


def tiny(recipe: str) -> Setting:
    """The rehearsal with one epoch of each on a few scenes."""
    full = SETTINGS[recipe, "rehearsal"]
    return replace(
        full,
        common=(*full.common, *words("--feature_dim 16 --num_workers 0")),
        teacher=(*full.teacher, *words("--max_epoch 2")),
        student=(*full.student, *words("--max_epoch 1 --warmup_epoch 0")),
        drawn=DrawnScenes(num_classes=10, images_per_class=6, image_size=32, seed=0),
    )


@pytest.fixture(scope="module")
def small_recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, ("resnet12", "rehearsal"), tiny("resnet12"))
        yield


COMMAND = ("--recipe", "resnet12", "--scale", "rehearsal", "--seeds", "0", "1")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, landmark, small_recipe):
    """A sweep whose third student fails once, and that is gone on with."""
    folder = tmp_path_factory.mktemp("repro") / "run"
    trained, real = [], session.Trainer.train

    def fails_once(self):
        trained.append(self.folder)
        if len(trained) == 4:
            raise OSError("the disk is full")
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Trainer, "train", fails_once)
        stopped = landmark(*COMMAND, "--output", folder, "--continue", entry="reproduce")
        assert stopped.code == 1 and "the disk is full" in stopped.err
        assert not (folder / "result.json").exists()
        done = landmark(*COMMAND, "--output", folder, "--continue", entry="reproduce")
    assert done.code == 0, done.err
    assert len(trained) == 1 + 2 * 3 + 1  # nothing but the failed one is done twice
    return folder, done, COMMAND


def test_first_and_last_line_say_rehearsal(reproduced):
    lines = reproduced[1].out.strip().splitlines()
    for line in (lines[0], lines[-1]):
        assert line.startswith("REHEARSAL") and "not a reproduction" in line
    said = read_result(reproduced[0] / "result.json")["measured"]["verdicts"]
    assert lines[-1].endswith(" ".join(said)) and "Distillation" in said[-1]
    assert " ".join(said) in (reproduced[0] / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "helped"),
    [(0.001, 0.02, "helped in"), (-0.01, 0.02, "did not help for sure in"),
     (-0.02, -0.001, "did not help, it hurt in"), (None, None, "did not help for sure in")],
)  # fmt: skip
def test_the_verdict_is_that_of_the_interval_and_the_floor(low, high, helped):
    gap = {"mean": 0.011, "low": low, "high": high, "n": 3}
    measured = {
        "arms": {"fixed": {"recall_at_1": {"mean": 0.94}, "vr_0.01": {"mean": 0.5}}},
        "trained_features": {"recall_at_1": 0.95, "vr_0.01": 0.25},
        "paired": {"fixed - none": {"recall_at_1": gap}},
    }
    rate, recall, teacher = verdicts(measured, "fixed")
    assert "0.5000, above trained features (0.2500)" in rate and rate.startswith("VR at FAR 0.01")
    assert "0.9400, BELOW trained features (0.9500)" in recall
    assert teacher.startswith(f"Distillation {helped} recall@1: +1.1 points (")
    assert ("one seed" in teacher) == (low is None)


def test_record_holds_every_run_and_the_differences(reproduced):
    folder, _, _ = reproduced
    record = read_result(folder / "result.json")
    assert record["data"]["kind"] == "built-in" and record["scale"] == "rehearsal"
    assert record["seeds"] == [0, 1] and record["task"] == "landmark_distill/resnet12"
    measured = record["measured"]
    assert set(measured["arms"]) == set(ARMS) == {"fixed", "own", "none"}
    assert set(measured["paired"]) == {"fixed - own", "fixed - none"}
    for arm, runs in measured["runs"].items():
        values = [one["vr_0.1"] for one in runs]
        assert measured["arms"][arm]["vr_0.1"]["mean"] == pytest.approx(np.mean(values))
        assert measured["arms"][arm]["vr_0.1"]["std"] == pytest.approx(np.std(values, ddof=1))
        # Each number is that of the features which lie there.
        split = json.loads((folder / "split.json").read_text())
        paths = [path for path, _, _, part in split["samples"] if part == "test"]
        features = np.load(folder / runs[0]["folder"] / "opensetFeat.npy")
        rates = verification_rates(features, folder_labels(paths), far_targets=(0.1,))
        assert runs[0]["vr_0.1"] == pytest.approx(rates["fine"].rates[0])
        assert runs[0]["coarse_vr_0.1"] == pytest.approx(rates["coarse"].rates[0])
    gap = [
        a["recall_at_1"] - b["recall_at_1"]
        for a, b in zip(measured["runs"]["fixed"], measured["runs"]["none"], strict=True)
    ]
    assert measured["paired"]["fixed - none"]["recall_at_1"]["mean"] == pytest.approx(np.mean(gap))


def test_students_share_split_views_and_stored_answers(reproduced):
    folder, _, _ = reproduced
    hashes = {read_result(path)["data"]["split_hash"] for path in folder.rglob("result.json")}
    assert len(hashes) == 1
    # One view of each training image: the answers of two seeds and two arms lie there once.
    record = read_result(folder / "result.json")
    store = KnowledgeStore.open(folder / "knowledge" / "features")
    assert len(store) == record["data"]["splits"]["train"]
    commands = [read_result(p)["command"] for p in (folder / "cells").rglob("result.json")]
    assert len(commands) == 1 + 2 * 3
    assert sum("--head_fixed" in c for c in commands) == 2
    assert sum("--is_distill" in c for c in commands) == 4


def test_report_shows_tables_and_pictures(reproduced):
    folder, _, _ = reproduced
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in ("roc.png", "nearest.png", "training.png"):
        assert f"]({name})" in text
        picture = cv2.imread(str(folder / name))
        assert picture is not None and picture.std() > 5
    assert "Plain image features" in text and "fixed - none" in text and "REHEARSAL" in text
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") == 3


def test_going_on_repeats_nothing_and_changes_nothing(reproduced, landmark):
    folder, _, command = reproduced
    models = {p: p.read_bytes() for p in folder.rglob("max_acc.pth")}
    before = read_result(folder / "result.json")["measured"]
    done = landmark(*command, "--output", folder, "--continue", entry="reproduce")
    assert done.code == 0
    assert {p: p.read_bytes() for p in models} == models
    assert read_result(folder / "result.json")["measured"] == before
    done = landmark(*command, "--output", folder, entry="reproduce")
    assert done.code == 1 and "already holds a run" in done.err


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--scale", "short"], 1, "omniglot_small"),
        (["--scale", "full"], 2, "--data-path"),
        (["--seeds", "1", "1"], 2, "--seeds"),
        (["--fresh", "--continue"], 2, "expected one of them"),
        (["--teacher", "none.pth"], 1, "none.pth"),
        (["--data-path", "none"], 1, "none"),
        (["--recipe", "other"], 2, "invalid choice"),
    ],
)
def test_bad_usage(landmark, tmp_path, more, code, named):
    done = landmark(
        "--recipe", "resnet12", "--data-root", tmp_path, "--output", tmp_path / "o", *more,
        entry="reproduce",
    )  # fmt: skip
    assert done.code == code and named in done.err and not (tmp_path / "o").exists()


def test_every_setting_is_a_command_that_parses(tmp_path):
    (tmp_path / "t.pth").touch()
    for setting in SETTINGS.values():
        for own, arm in (
            (setting.teacher, ()),
            *((setting.student, a.options) for a in ARMS.values()),
        ):
            more = []
            if "--is_distill" in arm:
                more = ["--teacher_backbone_class", "Resnet12"]
                more += ["--teacher_init_weights", str(tmp_path / "t.pth"), *setting.distilled]
            parse([*setting.common, *own, *arm, *more], prog="main.py")


def test_floor_is_what_plain_features_reach(reproduced):
    """Without a network, on the very images that the students are tested on."""
    from shared_core.datasets import decode
    from shared_core.metrics.floor import plain_features

    folder, _, _ = reproduced
    split = json.loads((folder / "split.json").read_text())
    paths = [path for path, _, _, part in split["samples"] if part == "test"]
    rows = np.stack([plain_features(decode(folder / "data" / "scenes" / p)) for p in paths])
    labels = folder_labels(paths)["fine"]
    found = verification_rates(rows - rows.mean(0), {"": labels}, far_targets=(0.1,))[""]
    floor = read_result(folder / "result.json")["measured"]["floor"]
    assert floor["vr_0.1"] == pytest.approx(found.rates[0])
    assert floor["vr_0.0001"] is None  # so few pairs say nothing of it


def test_two_parts_share_a_folder_and_the_last_one_reports(
    landmark, small_recipe, tmp_path, reproduced
):
    words = (*COMMAND, "--output", tmp_path / "shared")
    first = landmark(*words, "--shard", "1/2", entry="reproduce")
    assert first.code == 0 and "trials are not done here" in first.out, first.err
    second = landmark(*words, "--shard", "2/2", entry="reproduce")
    assert second.code == 0 and (tmp_path / "shared" / "report.html").exists()
    mine, whole = (
        read_result(folder / "result.json")["measured"]["arms"]
        for folder in (tmp_path / "shared", reproduced[0])
    )
    assert mine == whole  # as one process gives it


def test_a_given_teacher_is_not_trained_again(landmark, small_recipe, tmp_path, reproduced):
    folder, _, _ = reproduced
    (teacher,) = (folder / "cells").glob("teacher-s0/run/max_acc.pth")
    words = (*COMMAND, "--output", tmp_path / "given", "--teacher", teacher)
    done = landmark(*words, entry="reproduce")
    assert done.code == 0, done.err
    measured = read_result(tmp_path / "given" / "result.json")["measured"]
    assert "teacher" not in measured and not list(tmp_path.rglob("teacher-s0"))
    whole = read_result(folder / "result.json")["measured"]
    assert measured["arms"]["fixed"] == whole["arms"]["fixed"]
