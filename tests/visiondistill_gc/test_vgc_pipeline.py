"""A whole tiny run: files, folds, records, VisualDL, and the flags that are refused."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import paddle
import pytest
from sklearn.metrics import classification_report, confusion_matrix
from sklearn.utils.class_weight import compute_class_weight

from shared_core.datasets import decode
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import read_metrics, read_result
from visiondistill_gc.deploy.openers import facts_of
from visiondistill_gc.run import stages
from visiondistill_gc.run.comparisons import ARMS
from visiondistill_gc.utils.model_files import load_model
from visiondistill_gc.utils.prediction_files import load_predictions
from visiondistill_gc.utils.transforms import eval_view


@pytest.fixture(scope="module")
def trainings():
    """What each training of the finished run was given, by its stage."""
    return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, command, trainings):
    """A whole tiny run, and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    # With the comparison, and past the fifth epoch, where mixing begins.
    words = ("--epochs", "7", "--mixup-start", "5", "--compare-seeds", "0", "1")
    real = stages.fit

    def spy(training):
        trainings[training.stage] = training
        return real(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", spy)
        done = command(*tiny(folder), *words)
    assert done.code == 0, done.err
    return folder, done


@pytest.mark.parametrize("stage", ["teacher0", "teacher1", "fold0", "fold1"])
def test_a_fold_learns_from_all_but_its_own_part(finished, trainings, stage):
    folder, _ = finished
    fold, training = int(stage[-1]), trainings[stage]
    table = json.loads((folder / "folds.json").read_text())
    samples = json.loads((folder / "split.json").read_text())["samples"]
    wanted = {key for path, _, key, _ in samples if table.get(path, fold) != fold}
    assert set(training.images.keys) == wanted
    labels = [label for path, label, _, _ in samples if table.get(path, fold) != fold]
    weights = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    assert len(set(weights)) == 2  # or equal weights would pass for them
    assert training.loss.class_weights.numpy() == pytest.approx(weights)


def test_a_fold_is_taught_by_its_own_teacher(finished, trainings):
    folder, _ = finished
    for fold in (0, 1):
        file = load_model(folder / "models_saved" / f"teacher_fold{fold}.pdparams")
        taught = trainings[f"fold{fold}"].teacher.net.state_dict()
        expected = file.net.state_dict()
        assert all(np.array_equal(taught[k].numpy(), expected[k].numpy()) for k in expected)
        assert trainings[f"teacher{fold}"].teacher is None


def test_the_model_that_is_kept_is_the_one_that_was_measured(finished):
    folder, _ = finished
    done = json.loads((folder / "stages.json").read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    for fold in (0, 1):
        part = load_predictions(folder / "predictions" / f"fold{fold}.npz")
        right = (part.probs.argmax(axis=1) == part.labels).mean()
        seen = [x["acc"] for x in lines if (x["stage"], x["split"]) == (f"fold{fold}", "val")]
        assert done[f"fold{fold}"]["accuracy"] == pytest.approx(right) == pytest.approx(max(seen))
        assert done[f"fold{fold}"]["epoch"] == int(np.argmax(seen))  # the first of equals


def test_the_arms_of_the_comparison_are_what_they_are_called(finished, trainings):
    folder, _ = finished
    found = {arm: trainings[f"compare-{arm}-1"] for arm in ARMS}
    right = found["distilled"].teacher.net.state_dict()
    random = found["random_head_teacher"].teacher.net.state_dict()
    changed = {k for k in right if not np.array_equal(right[k].numpy(), random[k].numpy())}
    assert {name.split(".")[0] for name in changed} == {"_fc"}
    assert found["undistilled"].teacher is None and found["undistilled"].loss.alpha == 1
    assert found["distilled"].loss.alpha == 0.5
    mixed = {arm: training.plan.how.mixup for arm, training in found.items()}
    assert mixed.pop("without_mixup") == 0 and set(mixed.values()) == {0.2}
    comparison = read_result(folder / "result.json")["measured"]["comparison"]
    arms = {name: np.array(arm["values"]) for name, arm in comparison["arms"].items()}
    gap = comparison["differences"]["distilled - undistilled"]
    by_hand = arms["distilled"] - arms["undistilled"]
    assert gap["values"] == pytest.approx(by_hand) and gap["mean"] == pytest.approx(by_hand.mean())


def test_what_it_leaves(finished):
    folder, done = finished
    lines = done.out.strip().splitlines()
    assert lines[0].startswith("REHEARSAL")
    assert lines[-1].startswith(f"{lines[0]} Distillation ")
    assert "the student starts from nothing, so no block is frozen" in done.out
    for name in ("result.json", "report.md", "report.html", "folds.json", "augmentations.png"):
        assert (folder / name).stat().st_size > 0
    assert not list((folder / "state").glob("*.pdparams"))
    record = read_result(folder / "result.json")
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    measured = record["measured"]
    assert measured["teacher"]["head"] == "trained"
    assert "teacher of fold 0: validation accuracy" in done.out
    assert set(measured["comparison"]["arms"]) == {
        *("distilled", "undistilled", "without_mixup", "random_head_teacher")
    }
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") >= 6 and "not a reproduction" in page


def test_mixing_began_where_it_was_told(finished):
    folder, _ = finished
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if x["stage"] == "fold0"]
    accuracy = [x["acc"] * 16 for x in lines if x["split"] == "train"]  # two batches of eight
    assert len(accuracy) == 7
    whole = [abs(a - round(a)) < 1e-6 for a in accuracy]
    assert all(whole[:5]) and not any(whole[5:])  # a mixture counts by parts


def test_every_image_is_validated_once(finished):
    folder, _ = finished
    pooled = load_predictions(folder / "predictions" / "out_of_fold.csv")
    table = json.loads((folder / "folds.json").read_text())
    assert sorted(pooled.keys) == sorted(table)
    samples = json.loads((folder / "split.json").read_text())["samples"]
    assert not set(table) & {path for path, _, _, part in samples if part == "test"}
    for fold in (0, 1):
        own = load_predictions(folder / "predictions" / f"fold{fold}.npz")
        assert {table[key] for key in own.keys} == {fold}
        labels = {path: label for path, label, _, _ in samples}
        assert own.labels.tolist() == [labels[key] for key in own.keys]


def test_tables_are_scikit_learns(finished):
    folder, _ = finished
    pooled = load_predictions(folder / "predictions" / "out_of_fold.csv")
    said = pooled.probs.argmax(axis=1)
    with (folder / "tables" / "out_of_fold_confusion.csv").open() as file:
        rows = list(csv.reader(file))
    matrix = np.array([[int(x) for x in row[1:]] for row in rows[1:]])
    assert np.array_equal(matrix, confusion_matrix(pooled.labels, said))
    expected = classification_report(
        pooled.labels, said, target_names=pooled.class_names, output_dict=True, zero_division=0
    )
    found = json.loads((folder / "tables" / "out_of_fold_report.json").read_text())
    for name in pooled.class_names:
        assert found[name] == pytest.approx(expected[name])
    by_fold = [load_predictions(folder / "predictions" / f"fold{fold}.npz") for fold in (0, 1)]
    accuracy = [(p.probs.argmax(axis=1) == p.labels).mean() for p in by_fold]
    folds = read_result(folder / "result.json")["measured"]["out_of_fold"]["accuracy"]
    assert folds["mean"] == pytest.approx(np.mean(accuracy))
    assert folds["std"] == pytest.approx(np.std(accuracy, ddof=1))


def test_ensemble_is_the_mean_of_probabilities(finished):
    folder, _ = finished
    stored = load_predictions(folder / "predictions" / "ensemble_test.npz")
    split = json.loads((folder / "split.json").read_text())["samples"]
    paths = [path for path, _, _, part in split if part == "test"]
    tables = []
    for fold in (0, 1):
        model = load_model(folder / "models_saved" / f"best_model_fold{fold}.pdparams")
        view, rows = eval_view(model.input_size), []
        for path in paths:
            pixels = view(decode(folder / "data" / "scenes" / path))
            rows.append((pixels / 255.0 - model.mean) / model.std)
        images = np.stack(rows).transpose(0, 3, 1, 2).astype(np.float32)
        logits = model.net(paddle.to_tensor(images)).numpy().astype(np.float64)
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        tables.append(exps / exps.sum(axis=1, keepdims=True))
    assert np.abs(tables[0] - tables[1]).max() > 1e-3  # or one of them would pass for the mean
    assert stored.probs == pytest.approx(np.mean(tables, axis=0), abs=1e-5)


def test_visualdl_has_every_epoch(finished):
    from visualdl import LogReader

    folder, _ = finished
    for fold in (0, 1):
        (file,) = (folder / "logs" / f"fold_{fold}").glob("vdlrecords*")
        reader = LogReader(file_path=str(file))
        tags = reader.get_tags()
        assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(tags["scalar"])
        assert [x.id for x in reader.get_data("scalar", "val/acc")] == list(range(7))
        assert any(tag.startswith("pr/") for tag in tags["pr_curve"])
        assert any(tag.startswith("weights/") for tag in tags["histogram"])
    (file,) = (folder / "logs" / "data").glob("vdlrecords*")
    assert LogReader(file_path=str(file)).get_tags()["image"]


def test_students_files_know_their_classes(finished):
    folder, _ = finished
    path = folder / "models_saved" / "best_model_fold0.pdparams"
    model = load_model(path, categories=["fields_stripes", "tanks_grid"])
    assert model.input_size == 32 and not model.net.training
    origin = facts_of(model).provenance
    assert origin["data"] == "built-in scenes" and origin["teacher"] == "shufflenet_v2_x0_25"
    split = json.loads((folder / "result.json").read_text())["data"]["split_hash"]
    assert origin["split_hash"] == split and origin["initial_weights"] is None
    with pytest.raises(ValueError, match="another order"):
        load_model(path, categories=["tanks_grid", "fields_stripes"])
    with pytest.raises(ValueError, match="other classes"):
        load_model(path, categories=["a", "b", "c"])


def test_two_runs_are_equal_bit_for_bit(tmp_path, tiny, command, digests):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, workers in zip(folders, ("0", "2"), strict=True):
        done = command(*tiny(folder, "--num-workers", workers, "--no-visualdl"))
        assert done.code == 0, done.err
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in folders]
    assert logs[0] == logs[1]
    weights = []
    for folder in folders:
        model = load_model(folder / "models_saved" / "best_model_fold1.pdparams")
        weights.append(model.facts["sha256"])
    assert weights[0] == weights[1]


def test_answers_from_a_store(tmp_path, tiny, command):
    """The way of a teacher of any framework: one answer an image, found by content."""
    first = tmp_path / "first"
    assert command(*tiny(first, "--stage", "prepare", "--no-visualdl")).code == 0
    samples = json.loads((first / "split.json").read_text())["samples"]
    classes = json.loads((first / "split.json").read_text())["classes"]
    labels = np.array([label for _, label, _, _ in samples])
    with KnowledgeStore.create(
        tmp_path / "store",
        teacher_hash="a" * 64,
        classes=classes,
        view=eval_view(32).settings(),
    ) as store:
        store.put([key for _, _, key, _ in samples], 0, 8.0 * np.eye(2)[labels])
    second = tmp_path / "second"
    words = tiny(second, "--teacher-knowledge", str(tmp_path / "store"), "--folds", "0")
    done = command(*words)
    assert done.code == 0, done.err
    assert "stored teacher: accuracy 1.0000" in done.out and "teacher0" not in done.out
    teacher = read_result(second / "result.json")["measured"]["teacher"]
    assert teacher["kind"] == "stored answers" and teacher["teacher_hash"] == "a" * 64
    assert read_result(second / "result.json")["measured"]["out_of_fold"]["folds"] == [0]


def test_written_answers_are_the_live_teachers(tmp_path, finished, tiny, command, capsys):
    """A replayed training view: the store's answers are those of the teacher for its pixels."""
    from shared_core.datasets import view_rng
    from visiondistill_gc import write_knowledge
    from visiondistill_gc.config import parse
    from visiondistill_gc.utils.data_utils import prepare, train_view

    teacher = finished[0] / "models_saved" / "teacher_fold0.pdparams"
    words = tiny(tmp_path / "run", "--knowledge-seed", "3")
    assert (
        write_knowledge.main(
            ["--model", str(teacher), "--store", str(tmp_path / "s"), "--views", "2", *words]
        )
        == 0
    )
    settings = parse(words, prog="write_knowledge.py")
    data, view = prepare(settings, settings.run.output), train_view(settings, seed=3)
    store = KnowledgeStore.open(tmp_path / "s", view=view.settings(), classes=list(data.classes))
    assert store.views == (0, 1) and len(store) == 2 * len(data.images)
    loaded = load_model(teacher)
    for number in (0, 1):
        key, pixels = data.images.keys[5], data.images.image(5)
        image = view(pixels, view_rng(3, key, number)) / 255.0
        image = ((image - loaded.mean) / loaded.std).transpose(2, 0, 1)[None].astype(np.float32)
        logits = loaded.net(paddle.to_tensor(image)).numpy()
        assert store.get([key], number) == pytest.approx(logits, rel=1e-4, abs=1e-5)


def test_untrained_teacher_is_refused_or_labelled(tmp_path, tiny, command):
    words = [w for w in tiny(tmp_path / "run") if w != "--allow-untrained-teacher"]
    done = command(*words, "--teacher-epochs", "0")
    assert done.code == 2 and "--allow-untrained-teacher" in done.err
    done = command(*tiny(tmp_path / "run", "--teacher-epochs", "0", "--epochs", "2"))
    assert done.code == 0, done.err
    assert "its head is UNTRAINED" in done.out
    record = read_result(tmp_path / "run" / "result.json")
    assert record["measured"]["teacher"]["head"] == "UNTRAINED"
    assert "untrained" in (tmp_path / "run" / "report.md").read_text()


def test_own_folder_with_a_bad_file(tmp_path, tiny, command):
    rng = np.random.default_rng(0)
    root = tmp_path / "my images"
    for name in ("Harmful", "Kitchen"):
        (root / name).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
            cv2.imwrite(str(root / name / f"{number}.png"), pixels)
    (root / "Kitchen" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    words = ("--scale", "full", "--data-path", str(root), "--stage", "prepare", "--decoded-cache")
    done = command(*tiny(tmp_path / "run"), *words)
    assert done.code == 0, done.err
    assert "Kitchen/broken.jpg" in (tmp_path / "run" / "quarantine.txt").read_text()
    assert (tmp_path / "run" / "decoded" / "pixels.bin").stat().st_size == 48 * 40 * 30 * 3
    done = command(*tiny(tmp_path / "other"), *words, "--categories", "Harmful", "Paper")
    assert done.code == 1 and "--categories Harmful Paper" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--folds", "2"), "--folds 2"),
        (("--warmup-epochs", "9"), "--warmup-epochs 9"),
        (("--teacher", "resnet5"), "--teacher resnet5"),
        (("--alpha", "1", "--teacher-weights", __file__), "--teacher-weights"),
        (("--cache-size", "64"), "--decoded-cache"),
        (("--knowledge-seed", "3"), "--teacher-knowledge"),
        (("--fresh", "--resume"), "expected one of them"),
        (("--student-source", "paddleclas", "--head", "improved"), "--head improved"),
        (("--frozen", "14"), "--frozen 14 with --init none"),
        (("--probe",), "--probe needs trained weights"),
        (("--teacher-frozen", "3"), "--teacher-frozen needs trained weights"),
        (("--student", "lite0"), "--hidden would have no effect: it is of mobilenet_v2"),
        (("--init", "trained"), "--student-scale 0.1: trained weights are of width 1"),
        (("--split", __file__, "--test-share", "0.2"), "--test-share"),
        (("--amp", "O1"), "needs a GPU"),
        (("--mixup", "-1"), "[0, inf)"),
        (("--head", "plain", "--hidden", "8"), "--hidden"),
        (("--jitter", "0", "0", "0", "0.9"), "--jitter"),
        (("--stage", "evaluate"), "--stage evaluate needs"),
    ],
)
def test_refused(tmp_path, tiny, command, words, said):
    done = command(*tiny(tmp_path / "run"), *words)
    assert done.code == 2, done.out
    assert said in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("--pretrained", "x.none"),
        ("--init", "x.none"),
        ("--split", "x.none"),
        ("--data-path", "none"),
        ("--teacher-knowledge", "none"),
    ],
)
def test_missing_files(tmp_path, tiny, command, words):
    done = command(*tiny(tmp_path / "run"), *words)
    assert done.code == 1 and "none" in done.err and done.err.count("\n") == 1


def test_help_lists_the_originals_constants(command):
    said = command("--help").out
    for flag in (
        *("--data-path", "--categories", "--input-size", "--seed", "--n-splits", "--batch-size"),
        *("--num-workers", "--epochs", "--temperature", "--alpha", "--base-lr", "--weight-decay"),
        *("--patience", "--warmup-epochs", "--mixup", "--mixup-start", "--frozen", "--dropout"),
        *("--hidden", "--log-dir", "--save-dir", "--hflip", "--vflip", "--rotation", "--jitter"),
        *("--crop-padding", "--erasing"),
    ):
        assert flag in said


def test_defaults_are_the_originals(tmp_path):
    from visiondistill_gc.config import parse

    (tmp_path / "x").mkdir()
    settings = parse(["--scale", "full", "--data-path", str(tmp_path)], prog="main.py")
    found = settings.plain()
    assert (found["input_size"], found["seed"], found["n_splits"]) == (224, 42, 5)
    assert (found["batch_size"], found["epochs"], found["patience"]) == (16, 50, 10)
    assert (found["temperature"], found["alpha"], found["lr"]) == (4.0, 0.5, 1e-4)
    assert (found["weight_decay"], found["warmup_epochs"], found["dropout"]) == (1e-4, 5, 0.5)
    assert (found["mixup"], found["mixup_start"], found["hidden"]) == (0.2, 5, 1024)
    assert (found["teacher"], found["erasing"], found["rotation"]) == ("resnet50", 0.2, 30.0)
    assert (found["hflip"], found["vflip"], found["crop_padding"]) == (0.5, 0.3, 8)
    assert found["jitter"] == [0.3, 0.3, 0.3, 0.1]
    assert found["output"] == "runs/visiondistill_gc/garbage-full"
