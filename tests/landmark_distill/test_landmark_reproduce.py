"""The reproduction on tiny scenes: its steps, its record and report, going on after a stop."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from landmark_distill import repro_settings, reproduction
from landmark_distill.repro_settings import ARMS, SETTINGS, Setting, words
from landmark_distill.reproduction import compare
from shared_core.metrics import verification_rate
from shared_core.runs import read_result


def tiny(recipe: str) -> Setting:
    """The rehearsal with one epoch of each on a few scenes."""
    full = SETTINGS[recipe, "rehearsal"]
    return Setting(
        common=(*full.common, *words("--feature_dim 16 --num_workers 0")),
        teacher=(*full.teacher, *words("--max_epoch 2")),
        student=(*full.student, *words("--max_epoch 1 --warmup_epoch 0")),
        distilled=full.distilled,
        scenes={"num_classes": 10, "image_size": 32, "images_per_class": 6, "seed": 0},
        threads=1,
    )


@pytest.fixture(scope="module")
def small_recipe():
    before = dict(SETTINGS)
    repro_settings.SETTINGS["resnet12", "rehearsal"] = tiny("resnet12")
    yield
    repro_settings.SETTINGS.update(before)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, landmark, small_recipe):
    folder = tmp_path_factory.mktemp("repro") / "run"
    command = ("--recipe", "resnet12", "--scale", "rehearsal", "--seeds", "0", "1")
    done = landmark(*command, "--output", folder, "--continue", entry="reproduce")
    assert done.code == 0, done.err
    return folder, done, command


def test_first_and_last_line_say_rehearsal(reproduced):
    lines = reproduced[1].out.strip().splitlines()
    for line in (lines[0], lines[-1]):
        assert line.startswith("REHEARSAL") and "not a reproduction" in line


def test_record_holds_every_run_and_the_differences(reproduced):
    folder, _, _ = reproduced
    record = read_result(folder / "result.json")
    assert record["data"]["kind"] == "built-in" and record["scale"] == "rehearsal"
    assert record["seeds"] == [0, 1] and record["task"] == "landmark_distill/resnet12"
    measured = record["measured"]
    assert set(measured["arms"]) == set(ARMS) == {"fixed", "own", "none"}
    assert set(measured["paired"]) == {"fixed - own", "fixed - none"}
    for arm, runs in measured["runs"].items():
        values = [one["vr_0.01"] for one in runs]
        assert measured["arms"][arm]["vr_0.01"]["mean"] == pytest.approx(np.mean(values))
        assert measured["arms"][arm]["vr_0.01"]["std"] == pytest.approx(np.std(values, ddof=1))
        # The number is the core's on the features that lie there.
        features = np.load(folder / runs[0]["folder"] / "opensetFeat.npy")
        assert len(features) == record["data"]["splits"]["test"]
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
    from shared_core.knowledge import KnowledgeStore

    store = KnowledgeStore.open(folder / "knowledge" / "features")
    assert len(store) == record["data"]["splits"]["train"]
    commands = [read_result(p)["command"] for p in (folder / "runs").rglob("result.json")]
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
    assert "plain features" in text and "fixed - none" in text and "REHEARSAL" in text
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") == 3


def test_going_on_repeats_nothing_and_changes_nothing(reproduced, landmark):
    folder, _, command = reproduced
    models = {p: p.read_bytes() for p in folder.rglob("max_acc.pth")}
    before = read_result(folder / "result.json")["measured"]
    done = landmark(*command, "--output", folder, "--continue", entry="reproduce")
    assert done.code == 0 and done.out.count("done before") == 7
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
        (["--seeds", "1"], 2, "--seeds"),
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


def test_comparison_by_hand():
    rows = {
        "fixed": [{"x": 0.5}, {"x": 0.7}, {"x": 0.6}],
        "none": [{"x": 0.4}, {"x": 0.5}, {"x": 0.6}],
    }
    found = compare(rows)
    assert found["arms"]["fixed"]["x"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
        "n": 3,
    }
    gap = found["paired"]["fixed - none"]["x"]
    # Differences 0.1, 0.2, 0: mean 0.1, deviation 0.1; t(0.975, 2) = 4.3027.
    assert gap["mean"] == pytest.approx(0.1) and gap["std"] == pytest.approx(0.1)
    assert gap["low"] == pytest.approx(0.1 - 4.302653 * 0.1 / 3**0.5, rel=1e-5)
    assert gap["wins"] == 2


def test_every_setting_is_a_command_that_parses(tmp_path):
    from landmark_distill import config

    (tmp_path / "t.pth").touch()
    for setting in SETTINGS.values():
        for own, arm in ((setting.teacher, ()), *((setting.student, a[1]) for a in ARMS.values())):
            more = []
            if "--is_distill" in arm:
                more = ["--teacher_backbone_class", "Resnet12"]
                more += ["--teacher_init_weights", str(tmp_path / "t.pth"), *setting.distilled]
            config.parse([*setting.common, *own, *arm, *more], prog="main.py")


def test_floor_numbers_are_the_cores():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 8)), np.repeat(np.arange(6), 10)
    result = reproduction.openset_test(
        features, {"coarse": labels // 2, "fine": labels}, far_targets=reproduction.FARS
    )
    row = reproduction.numbers(result)
    expected = verification_rate(features, labels, far_targets=(0.01,)).rates[0]
    assert row["vr_0.01"] == pytest.approx(expected)
