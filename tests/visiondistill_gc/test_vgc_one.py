"""One student: of a manifest's parts, or taught by all folds; and its export from the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256

import cv2
import numpy as np
import pytest
import vgc_tools as tools

from shared_core.datasets import decode
from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.deploy import contract
from shared_core.deploy.facts import read_facts
from shared_core.knowledge import KnowledgeStore
from shared_core.metrics import softmax
from shared_core.runs import read_result
from visiondistill_gc import export
from visiondistill_gc.config import parse
from visiondistill_gc.run import stages
from visiondistill_gc.utils import data_utils
from visiondistill_gc.utils.model_files import load_model
from visiondistill_gc.utils.prediction_files import load_predictions
from visiondistill_gc.utils.transforms import eval_view

PARTS = {"train": 24, "calibration": 10, "test": 14}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 photographs in two classes, and a manifest that says what each is for."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(48):
        folder = root / ("Harmful" if number % 2 else "Kitchen")
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40, 3)) // (2 if number % 2 else 1)
        cv2.imwrite(str(folder / f"{number:02d}.png"), pixels.astype(np.uint8))
    words = ["--data-path", str(root), "--scale", "full", "--n-splits", "1", "--workers", "0"]
    first = tmp_path_factory.mktemp("split")
    manifest = data_utils.prepare(parse(words, prog="main.py"), first).prepared.manifest
    parts = [part for part, count in PARTS.items() for _ in range(count)]
    order = np.random.default_rng(1).permutation(len(parts))
    entries = tuple(
        entry._replace(split=parts[place])
        for entry, place in zip(manifest.entries, order, strict=True)
    )
    file = first / "manifest.json"
    replace(manifest, entries=entries, notes=()).write(file)
    return root, file


def keys_of(run, part):
    samples = json.loads((run / "split.json").read_text())["samples"]
    return {key for _, _, key, name in samples if name == part}


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny, command, photos):
    """A run of one student on the manifest's parts, taught by a store; what its training was."""
    folder, trainings, real = tmp_path_factory.mktemp("single") / "run", {}, stages.fit
    samples = json.loads(photos[1].read_text())["samples"]
    learned = [(key, label) for _, label, key, part in samples if part == "train"]
    store = folder.parent / "store"
    with KnowledgeStore.create(  # as torch_cls_zoo writes it: the part to learn from alone
        store,
        teacher_hash="b" * 64,
        classes=["Harmful", "Kitchen"],
        view=LetterboxView(64).settings(),
        dtype="float32",
    ) as made:
        logits = 6.0 * np.eye(2)[[label for _, label in learned]]
        made.put([key for key, _ in learned], 0, logits)

    def spy(training):
        trainings[training.stage] = training
        return real(training)

    words = ("--data-path", photos[0], "--split", photos[1], "--n-splits", "1", "--no-visualdl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", spy)
        done = command(
            *tiny(folder, *map(str, words), "--knowledge", str(store)), "--compare-seeds", "0"
        )
    assert done.code == 0, done.err
    return folder, done, trainings


def test_it_learns_from_the_training_part_and_is_chosen_on_calibration(single):
    folder, _, trainings = single
    assert set(trainings["fold0"].images.keys) == keys_of(folder, "train")
    seen = load_predictions(folder / "predictions" / "fold0.npz")
    samples = json.loads((folder / "split.json").read_text())["samples"]
    assert set(seen.keys) == {path for path, _, _, part in samples if part == "calibration"}
    measured = read_result(folder / "result.json")["measured"]
    assert measured["test"]["images"] == PARTS["test"]
    assert measured["test"]["ensemble"]["accuracy"] == measured["test"]["students"]["mean"]


def test_stored_answers_are_what_it_is_taught(single):
    folder, done, trainings = single
    training = trainings["fold0"]
    keys = list(training.images.keys)[:5]
    said = training.teacher(None, keys=keys, view=3, mix=None).numpy()
    assert said.argmax(axis=1).tolist() == training.images.labels[:5].tolist()
    assert "stored teacher: accuracy 1.0000 on the images to learn from" in done.out
    measured = read_result(folder / "result.json")["measured"]
    assert measured["teacher"]["saw"]["size"] == [64, 64]
    # A store has no head to make random, but the student from labels is there to compare with.
    assert set(measured["comparison"]["arms"]) == {"distilled", "undistilled", "without_mixup"}
    assert trainings["compare-undistilled-0"].teacher is None
    last = done.out.strip().splitlines()[-1]
    assert "one student" in last and "Distillation " in last and "folds" not in last


def test_its_export_reads_the_parts_of_its_run(single, photos, tmp_path, monkeypatch):
    for name in ("paddle2onnx", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    folder = single[0]
    asked, real = [], contract.Quantizer

    def watch(path, feed, **settings):
        asked.append(sum(map(len, feed)))
        return real(path, feed, **settings)

    monkeypatch.setattr(contract, "Quantizer", watch)
    words = ("--format", "onnx", "--int8", "yes", "--max-accuracy-loss", "1", "--unsure", "0.75")
    done = tools.call(export, folder, tmp_path / "model", *words)
    assert done.code == 0, done.err
    facts = read_facts(tmp_path / "model")
    assert asked == [PARTS["calibration"] // 2]  # the other half judges
    row = facts.measured["files"]["onnx"]
    assert row["agreement"]["images"] == row["accuracy"]["images"] == PARTS["test"]
    record = read_result(folder / "result.json")["measured"]["test"]["students"]["mean"]
    assert row["accuracy"]["value"] == pytest.approx(record)
    assert facts.unknown_threshold == 0.75 and facts.measured["judged_on"] == "test"
    model = load_model(folder / "models_saved" / "best_model.pdparams")
    assert facts.provenance["checkpoint_sha256"] == model.facts["sha256"]
    # A split that is not the model's judges nothing.
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("state"))
    split = tmp_path / "run" / "split.json"
    words = ["--data-path", str(photos[0]), "--scale", "full", "--n-splits", "1"]
    other = data_utils.prepare(parse(words, prog="main.py"), tmp_path / "other").prepared.manifest
    split.unlink()
    other.write(split)
    done = tools.call(export, tmp_path / "run", tmp_path / "no", "--format", "onnx")
    assert done.code == 1 and "expected that of the model" in done.err


def test_folders_that_hold_no_single_model(tmp_path, photos):
    done = tools.call(export, tmp_path, tmp_path / "model")
    assert done.code == 2 and "--n-splits 1, or --one-student" in done.err


def told(path):
    """What is stored of a fold, with answers that tell its images apart: tiny nets hardly do."""
    part = load_predictions(path)
    first = [0.1 + 0.8 * int(sha256(key.encode()).hexdigest()[:8], 16) / 2**32 for key in part.keys]
    return replace(part, probs=np.stack([first, 1 - np.array(first)], axis=1))


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny, command):
    """Two folds and the student that they taught."""
    folder, trainings, real = tmp_path_factory.mktemp("taught") / "run", {}, stages.fit

    def spy(training):
        trainings[training.stage] = training
        return real(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", spy)
        patch.setattr(stages, "load_predictions", told)
        done = command(*tiny(folder, "--one-student", "--no-visualdl"))
    assert done.code == 0, done.err
    return folder, done, trainings


def test_the_folds_teach_what_they_said_of_images_they_did_not_learn(taught):
    folder, _, trainings = taught
    training = trainings["one"]
    table = json.loads((folder / "folds.json").read_text())
    samples = json.loads((folder / "split.json").read_text())["samples"]
    key = {path: key for path, _, key, _ in samples}
    assert set(training.images.keys) == {key[path] for path in table}
    assert not set(training.images.keys) & keys_of(folder, "test")
    assert training.loss.alpha == 0.5 and training.plan.keep == "last"
    for fold in (0, 1):
        part = told(folder / "predictions" / f"fold{fold}.npz")
        assert {table[path] for path in part.keys} == {fold}
        said = training.teacher(None, keys=[key[p] for p in part.keys], view=5, mix=None)
        assert softmax(said.numpy()) == pytest.approx(part.probs, abs=1e-6)
    with KnowledgeStore.open(folder / "knowledge") as store:  # for students of other projects
        assert store.about["kind"] == "probs" and store.views == (0,)


def test_the_file_to_ship_is_the_one_that_was_judged(taught):
    folder, done, _ = taught
    path = folder / "models_saved" / "best_model.pdparams"
    assert f"the model to export: {path}" in done.out
    test = read_result(folder / "result.json")["measured"]["test"]
    said = load_predictions(folder / "predictions" / "one_test.npz")
    right = float((said.probs.argmax(axis=1) == said.labels).mean())
    assert test["one"]["accuracy"] == pytest.approx(right)
    assert test["one"]["low"] <= right <= test["one"]["high"]
    samples = json.loads((folder / "split.json").read_text())["samples"]
    paths = [path for path, _, _, part in samples if part == "test"]
    view, rng = eval_view(32), np.random.default_rng(0)
    pixels = np.stack([view(decode(folder / "data" / "scenes" / name), rng) for name in paths])
    assert said.probs == pytest.approx(softmax(load_model(path).logits(pixels)), abs=1e-4)
    assert "one student, taught by the folds' students" in (folder / "report.md").read_text()


def test_a_manifest_keeps_its_calibration_part_from_the_folds(photos, tmp_path):
    words = ["--data-path", str(photos[0]), "--scale", "full", "--split", str(photos[1])]
    data = data_utils.prepare(parse([*words, "--n-splits", "2"], prog="main.py"), tmp_path)
    assert len(data.images) == PARTS["train"] and len(data.test) == PARTS["test"]


def test_a_single_student_without_a_calibration_part_keeps_a_tenth(photos, tmp_path):
    words = ["--data-path", str(photos[0]), "--scale", "full", "--n-splits", "1"]
    settings = parse([*words, "--test-share", "0"], prog="main.py")
    data = data_utils.prepare(settings, tmp_path)
    assert data.test is None and 1 <= len(data.validation_rows(0)) <= 10
    assert len(data.validation_rows(0)) + len(data.train_rows(0)) == 48


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--one-student", "--n-splits", "1"), "trains one student"),
        (("--one-student", "--folds", "0"), "taught by all folds"),
        (("--n-splits", "1", "--test-share", "0.5"), "less than 0.5"),
    ],
)
def test_refused(tmp_path, tiny, command, words, said):
    done = command(*tiny(tmp_path / "run"), *words)
    assert done.code == 2 and said in done.err


def test_few_epochs_need_no_word_about_the_warm_up(tmp_path):
    words = ["--data-path", str(tmp_path), "--epochs", "1"]
    assert parse(words, prog="main.py").training.warmup_epochs == 0
