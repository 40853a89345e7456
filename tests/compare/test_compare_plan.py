"""Budgets, options and the plan: what fits the minutes, in which order, said in which words."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_tools import run_main
from compare.budget import budget_text, parse_budget
from compare.candidates import MAKERS, REPO, propose, sizes, wanted_epochs
from compare.contract import DataCheck, Plan, read
from compare.main import main
from compare.options import parse
from compare.plan import (
    GRID,
    JUDGED,
    Asked,
    Seconds,
    cost,
    fit,
    make_plan,
    measure_step,
    round_up,
)
from shared_core.runs import UsageError


def checked(train: int = 1000, calibration: int = 100, test: int = 200) -> DataCheck:
    counts = {"train": (train, 0), "calibration": (calibration, 0), "test": (test, 0)}
    return DataCheck("set", "real", "/images", ("a", "b"), counts, "hash", False, 85)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", []),
        ("ms<=5 mb<=4 accuracy>=0.95", [("ms", 5.0), ("mb", 4.0), ("accuracy", 0.95)]),
        (" MS <= 5ms,mb<=500kb; accuracy>=95% ", [("ms", 5.0), ("mb", 0.5), ("accuracy", 0.95)]),
        ("macs<=300M memory<=1gb", [("macs", 3e8), ("memory", 1000.0)]),
        ("macs<=3e8", [("macs", 3e8)]),
    ],
)
def test_a_budget_means_what_it_says(text, limits):
    found = parse_budget(text)
    assert [(one.what, pytest.approx(one.value)) for one in found] == limits
    assert parse_budget(budget_text(found) if found else "") == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ms>=5", "ms<=NUMBER, milliseconds an image"),
        ("ms<5", "ms<=NUMBER"),
        ("ms", "ms<=NUMBER"),
        ("fps>=30", "'fps' is unknown"),
        ("accuracy>=95", "a fraction, 0.95 or 95%"),
        ("mb<=0", "above 0"),
        ("mb<=4ms", "megabytes"),
        ("mb<=1.2.3", "megabytes"),
        ("ms<=5 ms<=6", "names ms twice"),
        ("<=5", "cannot read"),
    ],
)
def test_a_wrong_budget_is_one_line_that_says_the_unit(text, says):
    with pytest.raises(UsageError, match=r"--budget") as caught:
        parse_budget(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--candidates", "lite9"], "lite9: expected some of probe"),
        (["--continue", "--fresh"], "contradict"),
        (["--split", "x.json"], "expected --data-path"),
        (["--compare-with", "/nowhere"], "no such folder"),
        (["--minutes", "0"], "expected (0"),
    ],
)
def test_words_that_make_no_sense_are_one_line(words, says):
    done = run_main(main, words)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("script", ["main.py --budget fps>=3", "probe.py --run /no --output /x"])
def test_as_scripts_they_say_an_error_in_one_line(script):
    name, *words = script.split()
    done = subprocess.run(
        [sys.executable, str(REPO / "tools/compare" / name), *words], capture_output=True, text=True
    )
    assert done.returncode in (1, 2) and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1


def test_the_output_is_named_after_the_images():
    assert parse(["--data-path", "/x/birds.zip"]).output == Path("runs/compare/birds")
    assert parse([]).output == Path("runs/compare/scenes")
    assert parse([]).minutes < 4 < parse(["--data-path", "/x/birds"]).minutes == 30


def test_small_images_are_enlarged_and_the_second_size_costs_half():
    assert [sizes(n) for n in (28, 96, 128, 256, 4000)] == [
        (96, 64), (128, 96), (192, 128), (224, 160), (224, 160)
    ]  # fmt: skip
    for pixels in range(16, 600, 13):
        full, small = sizes(pixels)
        assert full % 32 == small % 32 == 0 and small < full <= 224
        assert 0.4 < (small / full) ** 2 < 0.65


def test_small_sets_are_seen_more_often():
    found = [wanted_epochs(n) for n in (12, 100, 2000, 6400, 100_000)]
    assert [enough for _, enough, _ in found] == sorted((e for _, e, _ in found), reverse=True)
    assert all(1 <= least <= enough <= most for least, enough, most in found)


STEPS = {  # seconds an image
    ("efficientnet_lite0", 128): Seconds(0.010, 0.003),
    ("efficientnet_lite0", 96): Seconds(0.006, 0.002),
    ("efficientnet_lite2", 128): Seconds(0.020, 0.006),
}


def proposals(*names: str):
    found = propose(checked(), feature_size=128)
    known = [one for one in found if one.step in STEPS]
    return [one for one in known if not names or one.name in names]


def test_the_price_is_what_is_done_with_each_image():
    (one,) = proposals("lite0-128")
    # 4 epochs of 1000 images to learn and 100 to validate, features of 1000, the files asked 9
    # times 200 test and 100 calibration images, start, export and timing.
    by_hand = 4 * (1000 * 0.010 + 100 * 0.003) + 1000 * 0.003 + 9 * 300 * 0.003 + one.fixed + JUDGED
    assert cost(one, 4, checked(), STEPS) == pytest.approx(by_hand)


def test_with_little_time_the_cheapest_useful_one_is_left_and_the_others_say_why():
    found = fit(proposals(), checked(), STEPS, 60.0)
    assert found["probe"] == (0, "")
    assert found["lite0-128"][1].startswith("needs 1.")
    assert "are left" in found["lite0-128"][1]
    assert "its teacher is left out" in found["student-96"][1]


def test_with_much_time_everything_gets_all_the_epochs_that_help():
    found = fit(proposals(), checked(), STEPS, 1e6)
    assert all(not reason for _, reason in found.values())
    assert all(found[one.name][0] == one.most for one in proposals() if one.trains)


def test_what_is_planned_never_takes_more_than_there_is():
    rng = random.Random(0)
    for _ in range(200):
        seconds, seeds = rng.uniform(0, 4000), rng.choice([1, 1, 3])
        found = fit(proposals(), checked(), STEPS, seconds, seeds=seeds)
        total = sum(
            cost(one, found[one.name][0], checked(), STEPS) * (seeds if one.trains else 1)
            for one in proposals()
            if not found[one.name][1]
        )
        assert total <= seconds or total == 0
        for one in proposals():
            if one.trains and not found[one.name][1]:
                assert one.least <= found[one.name][0] <= one.most


def test_a_teacher_is_made_only_where_a_student_of_it_fits_too():
    all_of_them = {one.name: one for one in proposals()}
    teacher, student = all_of_them["teacher"], all_of_them["student-96"]
    pair = [teacher, student]
    least = sum(cost(one, one.least, checked(), STEPS) for one in pair)
    short = fit(pair, checked(), STEPS, least - 1)
    assert short["teacher"][1].startswith("needs") and "left out" in short["student-96"][1]
    enough = fit(pair, checked(), STEPS, least + 1)
    assert enough == {"teacher": (teacher.least, ""), "student-96": (student.least, "")}


def planned(tmp_path: Path, minutes: float, *, jitter: float = 1.0, **more) -> Plan:
    said: list[str] = []
    every = Seconds(0.0105 * jitter, 0.0031 * jitter)
    plan = make_plan(
        checked(), Asked(minutes, **more), folder=tmp_path, feature_size=128, say=said.append,
        measure=lambda step, classes, threads: every,
    )  # fmt: skip
    assert read(tmp_path / "plan.json", Plan) == plan
    assert f"of {minutes:g} min" in said[0]
    for one in plan.candidates:
        line = next(line for line in said if line.split()[0] == one.name)
        assert (one.reason or f"{one.minutes:.1f} min") in line
    return plan


def test_a_step_that_took_a_little_longer_changes_no_plan(tmp_path):
    first = planned(tmp_path, 12)
    again = planned(tmp_path, 12, jitter=1.02)
    assert replace(again, steps={}) == replace(first, steps={})
    assert round_up(0.01) <= 0.01 * GRID and round_up(0.01) >= 0.01


def test_a_busy_moment_hits_all_steps_alike(tmp_path):
    """One step was measured while others computed: its own seconds are known all the same."""

    def measured(busy):
        steps: list = []

        def measure(step, classes, threads):
            steps.append(step)
            return Seconds(0.010, 0.003, busy.get(len(steps), 1.0))

        return make_plan(checked(), Asked(20), folder=tmp_path, feature_size=128,
                         say=lambda line: None, measure=measure)  # fmt: skip

    quiet, one, every = measured({}), measured({2: 9.0}), measured(dict.fromkeys(range(9), 3.0))
    assert one == quiet
    assert every.steps == {name: pytest.approx(3 * value) for name, value in quiet.steps.items()}
    assert sum(x.included for x in every.candidates) < sum(x.included for x in quiet.candidates)


def test_seeds_repeat_what_is_trained_beside_a_teacher_of_their_own(tmp_path):
    plan = planned(tmp_path, 1000, seeds=2, seed=7)
    by_name = {one.name: one for one in plan.candidates}
    assert "probe-s1" not in by_name  # nothing in it depends on the seed
    one, again = by_name["student-96"], by_name["student-96-s1"]
    assert (one.seed, one.teacher) == (7, "teacher")
    assert again.seed != 7 and again.teacher == "teacher-s1" and again.base == "student-96"


def test_who_asks_for_a_student_gets_its_teacher(tmp_path):
    plan = planned(tmp_path, 1000, candidates=("student",))
    left = {one.name: one.reason for one in plan.candidates if not one.included}
    assert {one.name for one in plan.candidates if one.included} == {"teacher", "student-96"}
    assert set(left.values()) == {"not asked for"}


def test_minutes_for_nothing_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UsageError, match=r"--minutes 0.1: nothing can be made \(probe needs"):
        planned(tmp_path, 0.1)
    assert not (tmp_path / "plan.json").exists()


def test_a_package_that_is_not_installed_leaves_its_candidates_out(tmp_path, monkeypatch):
    lacking = replace(MAKERS["lite0"], needs=("no_such_package",))
    monkeypatch.setitem(MAKERS, "lite0", lacking)
    plan = planned(tmp_path, 1000)
    reasons = {one.name: one.reason for one in plan.candidates if one.maker == "lite0"}
    assert set(reasons.values()) == {"needs the package no_such_package"}


def test_a_discriminant_for_many_classes_is_scikit_learns(monkeypatch):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    from compare import probe

    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (5, 12))
    labels = np.arange(400) % 5
    rows = centres[labels] + rng.normal(0, 1, (400, 12)) @ rng.normal(0, 0.6, (12, 12))
    chosen = list(range(0, 400, 2))
    monkeypatch.setattr(probe, "SHRINK", (0.1,))
    monkeypatch.setattr(probe, "CHUNK", 33)
    held = rows[1::2].astype(np.float32)
    found = probe.fit_means(
        rows, chosen, labels[chosen], num_classes=5, validation=(held, labels[1::2])
    )
    truth = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(rows[::2], labels[::2])
    # scikit-learn shrinks each class's spread on standardised features; answers agree, not digits.
    same = (found.logits(held).argmax(axis=1) == truth.predict(held)).mean()
    assert same > 0.97 and found.accuracy(held, labels[1::2]) > 0.5


def test_a_larger_view_takes_longer_here():
    small, large = (measure_step(("efficientnet_lite0", side), 3, 1) for side in (32, 128))
    assert 0 < small.learn < large.learn and 0 < small.answer < large.answer
    assert large.answer < large.learn
