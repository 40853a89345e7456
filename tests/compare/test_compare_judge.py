"""Every shipped file is judged alike: numbers by hand, the right split, one run of the clock."""

import shutil

import compare_runs as runs
import cv2
import numpy as np
import pytest
import tiny_models as tiny
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from compare import asking, judge, latency
from compare.contract import JUDGED_FILE, SPLIT_FILE, Judged, read_rows
from compare.unknown import describe, strange_images, threshold_of
from shared_core.datasets import DatasetError, Manifest
from shared_core.deploy.facts import ModelError, write_facts
from shared_core.deploy.predictor import open_model

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def save_worse(folder):
    return tiny.save_model(folder, weights=runs.WORSE)


def quick(timed, **_):
    """A clock by which every file takes 2 ms, or 1 ms an image of a batch."""
    return {name: {"1": {"p50": 2.0, "p95": 3.0}, "16": {"p50": 1.0, "p95": 1.5}} for name in timed}


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr(judge, "measure", quick)
    monkeypatch.setattr(asking, "memory_mb", lambda folder, *a, **k: 40.0 if folder else 30.0)


@pytest.fixture
def run(tmp_path, no_clock):
    check, plan = runs.make_run(tmp_path, good=tiny.save_model, worse=save_worse,
                                chain=tiny.save_chain)  # fmt: skip
    return tmp_path, check, plan


def judged(run, say=lambda line: None):
    return {(row.candidate, row.form): row for row in judge.judge(*run, say=say)}


def test_the_numbers_are_those_of_scikit_learn_and_scipy(run):
    rows = judged(run)
    assert read_rows(run[0] / JUDGED_FILE, Judged) == list(rows.values())
    for name, weights in (("good", tiny.WEIGHTS), ("worse", runs.WORSE)):
        row = rows[name, "onnx"]
        labels, given, top = runs.answers_by_hand("test", run[0], weights)
        right = int((labels == given).sum())
        wilson = binomtest(right, len(labels)).proportion_ci(method="wilson")
        assert row.accuracy.value == pytest.approx(accuracy_score(labels, given))
        assert (row.accuracy.low, row.accuracy.high) == pytest.approx((wilson.low, wilson.high))
        assert row.macro_f1 == pytest.approx(f1_score(labels, given, average="macro"))
        wanted = precision_recall_fscore_support(labels, given, labels=range(4), zero_division=0)
        for k, one in enumerate(row.per_class):
            assert (one.name, one.support) == (runs.CLASSES[k], wanted[3][k])
            assert one.recall == pytest.approx(wanted[1][k])
            assert one.precision is None or one.precision == pytest.approx(wanted[0][k])
        bins = np.ceil(top * 15).astype(int)
        ece = sum(abs((labels == given)[bins == b].sum() - top[bins == b].sum()) for b in set(bins))
        assert row.ece == pytest.approx(ece / len(labels), abs=1e-6)
        counts = {}
        for a, b in zip(labels, given, strict=True):
            if a != b:
                counts[runs.CLASSES[a], runs.CLASSES[b]] = (
                    counts.get((runs.CLASSES[a], runs.CLASSES[b]), 0) + 1
                )
        assert {(a, b): n for a, b, n in row.confusions} == counts
        assert [n for *_, n in row.confusions] == sorted(counts.values(), reverse=True)
        surest = np.sort(top[labels != given])[::-1][: judge.MISTAKES]
        assert [one.probability for one in row.mistakes] == pytest.approx(surest.tolist(), abs=1e-6)
        assert (run[0] / "images" / row.mistakes[0].path).is_file()
        labels, given, _ = runs.answers_by_hand("calibration", run[0], weights)
        assert row.calibration_accuracy == pytest.approx(accuracy_score(labels, given))
        assert row.memory_mb == 10.0 and row.throughput == 1000.0 and row.macs == 1000.0
        file = run[0] / "candidates" / name / "model" / "model.onnx"
        assert row.bytes == file.stat().st_size
    best, other = rows["good", "onnx"], rows["worse", "onnx"]
    assert best.difference is None
    assert other.difference.value == pytest.approx(other.accuracy.value - best.accuracy.value)


def test_a_chain_is_judged_at_its_own_operating_point(run):
    row = judged(run)["chain", "onnx"]
    files = asking.parts_of(run[0], run[1].root)["calibration"].files
    images = np.stack([cv2.resize(cv2.imread(str(file))[..., ::-1], (tiny.SIDE, tiny.SIDE))
                       for file in files])  # fmt: skip
    left, answers = tiny.exits_by_hand(images)
    assert row.macs == pytest.approx(np.mean([tiny.MACS[n] for n in left]))
    assert len(set(left)) > 1 and row.macs < tiny.MACS[-1]
    kept = asking.stored_answers(run[0], "chain")
    assert kept["onnx/calibration_top"] == pytest.approx(answers.max(axis=1), abs=1e-5)
    names = [runs.CLASSES.index(tiny.CLASSES[k]) for k in answers.argmax(axis=1)]
    assert kept["onnx/calibration"].tolist() == names
    assert row.bytes == sum(file.stat().st_size for file in
                            (run[0] / "candidates/chain/model").glob("*.onnx"))  # fmt: skip


def test_openvino_answers_the_same_file(run):
    pytest.importorskip("openvino")
    rows = judged(run)
    row, own = rows["good", "openvino"], rows["good", "onnx"]
    assert row.files == own.files and row.right == own.right
    assert row.accuracy == own.accuracy and "100.00 %" in row.notes[0]
    assert ("chain", "openvino") not in rows


def test_a_killed_judging_asks_only_who_is_missing_and_who_was_made_anew(run, monkeypatch):
    first = judged(run)
    (run[0] / JUDGED_FILE).unlink()
    (run[0] / "candidates" / "worse" / asking.ANSWERS_FILE).unlink()
    asked, real = [], judge.ask
    monkeypatch.setattr(judge, "ask", lambda model, *a, **k: (asked.append(model.parent.name),
                                                             real(model, *a, **k))[1])  # fmt: skip
    assert judged(run) == first and asked == ["worse"]
    asked.clear()
    model = run[0] / "candidates" / "good" / "model"
    tiny.save_model(model, tiny.make_facts(temperature=2.0), weights=runs.WORSE)
    again = judged(run)
    assert asked == ["good"]
    assert again["good", "onnx"].right == first["worse", "onnx"].right


def test_test_labels_touch_nothing_that_choices_are_made_by(run):
    before = judged(run)
    runs.swap_labels(run[0], "test")
    after = judged(run)
    for key, row in before.items():
        other = after[key]
        assert row.accuracy != other.accuracy
        assert (row.right, row.calibration_accuracy, row.macs) == (
            other.right, other.calibration_accuracy, other.macs
        )  # fmt: skip
        assert row.unknown == other.unknown
    runs.swap_labels(run[0], "calibration")
    assert judged(run)["good", "onnx"].right != before["good", "onnx"].right


def test_a_candidate_that_cannot_be_judged_does_not_end_the_run(run, tmp_path):
    folder, check, plan = run
    names = ("blue", "green", "red", "yellow")
    tiny.save_model(folder / "candidates/worse/model", tiny.make_facts(class_names=names))
    (folder / "candidates/chain/model/segment1.onnx").unlink()
    said = []
    rows = judge.judge(folder, check, plan, say=said.append)
    assert {row.candidate for row in rows} == {"good"}
    assert any("grey <b>" in line for line in said) and any("segment1" in line for line in said)
    (folder / "images/test/003.png").unlink()
    with pytest.raises(DatasetError, match="003.png"):
        judge.judge(folder, check, plan, say=said.append)


def test_time_is_taken_in_turns_in_changing_order_of_all_images():
    now, calls = [0.0], []

    def model(name, seconds):
        def run(batch):
            calls.append((name, int(batch[0, 0, 0, 0])))
            now[0] += seconds * len(batch) * (3 if batch[0, 0, 0, 0] == 7 else 1)

        return latency.Timed(run, np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1))

    timed = {"slow": model("slow", 0.05), "fast": model("fast", 0.004)}
    found = latency.measure(timed, batches=(1, 4), rounds=8, clock=lambda: now[0])
    assert found["slow"]["1"] == pytest.approx({"p50": 50.0, "p95": 115.0})
    assert found["fast"]["1"]["p50"] == pytest.approx(4.0)
    assert found["fast"]["1"]["p95"] == pytest.approx(12.0)  # the image that takes longer
    assert found["slow"]["4"] == pytest.approx({"p50": 50.0, "p95": 50.0})
    assert {pixel for _, pixel in calls} == set(range(8))
    names = [name for name, _ in calls[4 : 4 + 8 * 6]]  # one slow batch a round, five fast ones
    rounds = ["".join(name[0] for name in names[n : n + 6]) for n in range(0, len(names), 6)]
    assert set(rounds) == {"sfffff", "fffffs"}


def test_a_fresh_process_says_what_a_model_needs(tmp_path):
    tiny.save_model(tmp_path)
    empty, full = latency.memory_mb(None), latency.memory_mb(tmp_path, "onnx")
    assert 20 < empty < full < 2000
    assert latency.memory_mb(tmp_path / "nothing", "onnx") is None


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.95, 1.0])
def test_the_threshold_is_the_largest_that_enough_known_images_reach(keep):
    for count in (1, 3, 19, 20, 21, 200):
        top = np.random.default_rng(count).choice([0.3, 0.5, 0.61, 0.7, 0.9], count)
        found = threshold_of(top, keep=keep)
        fitting = [t for t in set(top.tolist()) if (top >= t).mean() >= keep - 1e-12]
        assert found == max(fitting)


def test_strange_images_are_of_no_class_of_the_network():
    from shared_core.datasets import scene_class_names

    view = tiny.make_facts().make_view()
    images = strange_images(view, scene_class_names()[:-1], count=3)
    assert set(images) == {"drawn scenes", "handwritten digits", "noise"}
    assert all(one.shape == (3, tiny.SIDE, tiny.SIDE, 3) for one in images.values())
    assert "drawn scenes" not in strange_images(view, scene_class_names(), count=3)
    assert "handwritten digits" not in strange_images(view, list("0123456789"), count=3)
    told = describe(0.5, np.array([0.4, 0.5, 0.9, 0.8]), {"a": np.array([0.6, 0.1]),
                                                         "b": np.array([0.2, 0.3])})  # fmt: skip
    assert (told["kept"], told["false_accepts"]) == (0.75, 0.25)
    assert told["by_kind"] == {"a": 0.5, "b": 0.0}


def test_unknown_is_measured_by_the_judge(run):
    row = judged(run)["good", "onnx"]
    top = runs.answers_by_hand("calibration", run[0])[2]
    assert row.unknown["threshold"] == pytest.approx(threshold_of(top), abs=1e-6)
    known = runs.answers_by_hand("test", run[0])[2]
    assert row.unknown["kept"] == pytest.approx((known >= row.unknown["threshold"] - 1e-7).mean())
    predictor = open_model(run[0] / "candidates/good/model")
    images = strange_images(predictor.view, runs.CLASSES)
    for kind, rate in row.unknown["by_kind"].items():
        tops = predictor.probabilities(images[kind]).max(axis=1)
        assert rate == pytest.approx((tops >= row.unknown["threshold"]).mean())


def test_an_old_winner_is_compared_image_by_image(run, tmp_path):
    from compare.choose import choose

    rows = judge.judge(*run, say=lambda line: None)
    choice = choose([row for row in rows if row.candidate == "good"], ())
    old = run[0] / "candidates/worse/model"
    lines = judge.compare_with(run[0], old, choice)
    labels, given, _ = runs.answers_by_hand("test", run[0])
    worse = runs.answers_by_hand("test", run[0], runs.WORSE)[1]
    new, before = given == labels, worse == labels
    assert f"accuracy {before.mean():.4f} before, {new.mean():.4f} now" in lines[0]
    gained, lost = (new & ~before).sum(), (~new & before).sum()
    assert f"right on {gained} images, only the old one on {lost}" in lines[1]
    name, number = lines[3].split(": ")[1].split(",")[0].rsplit(" ", 1)
    of_class = labels == runs.CLASSES.index(name)
    assert int(number) == new[of_class].sum() - before[of_class].sum()
    assert "is not known" in lines[-1]
    shutil.copytree(old, tmp_path / "before/winner")
    entries = [entry._replace(split="train") if entry.path in ("test/000.png", "test/001.png")
               else entry for entry in Manifest.read(run[0] / SPLIT_FILE).entries]  # fmt: skip
    runs.write_split(tmp_path / "before", entries)
    lines = judge.compare_with(run[0], tmp_path / "before", choice)
    assert "learned from 2 of these images" in lines[-1]
    write_facts(old, tiny.make_facts(class_names=("a", "b", "c", "d")))
    with pytest.raises(ModelError, match="other classes: .* is known to the"):
        judge.compare_with(run[0], old, choice)
