"""The command: train, evaluate, the modes one by one and together, and what bad input says."""

from __future__ import annotations

import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from shared_core.deploy.predictor import open_model
from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.runs import check_record, read_metrics, read_result
from shared_core.runs.lock import RunLock

ARCH = "test_resnet"


def test_training_learns_and_leaves_everything(zoo_trained):
    folder, done = zoo_trained
    record = read_result(folder / "result.json")
    check_record(record)
    assert record["measured"]["test"]["accuracy"] > 0.9  # colours: any net that learns gets there
    assert record["measured"]["test"]["images"] == 15
    assert record["data"]["splits"] == {"train": 24, "calibration": 15, "test": 15}
    for name in ("report.md", "report.html", "per_class.csv", "misclassified.csv",
                 "confusion_matrix.png", "config.json", "split.json"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["epoch"] for line in lines if line["split"] == "train"] == list(range(6))
    # 6 epochs with 1 of warm-up: boundaries 1, 1 + 15 // 8, 1 + 25 // 8, 1 + 35 // 8 by the rule.
    rates = [line["lr"] / 0.003 for line in lines if line["split"] == "train"]
    assert rates == pytest.approx([0.1, 1, 0.1, 0.1, 0.01, 0.001])
    assert "best weights of epoch" in done.out and "test: accuracy" in done.out


def test_best_and_last_are_apart_and_the_test_is_on_the_best(zoo_trained, zoo_best):
    folder, _ = zoo_trained
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if x["split"] == "val"]
    accuracies = [line["accuracy"] for line in lines]
    best_epoch = int(np.argmax(accuracies))  # the first of equals
    weights, facts = load_checkpoint(zoo_best, project="torch_cls_zoo", architecture=ARCH)
    assert facts["epoch"] == best_epoch + 1
    last, last_facts = load_checkpoint(folder / "checkpoints" / f"checkpoint_{ARCH}.pth")
    assert last_facts["epoch"] == 6
    assert facts["class_names"] == ["blue", "green", "red"]
    assert facts["input_size"] == [3, 24, 24] and facts["config"]["criterion"] == "softmax"
    if best_epoch != 5:
        assert any(not torch.equal(weights[name], last[name]) for name in weights)


def test_evaluation_alone_gives_the_training_s_own_numbers(
    zoo_trained, zoo_best, zoo_data, zoo_command, tmp_path
):
    for flag in ("-e", "--evaluate", "--evaluation"):
        done = zoo_command(flag, "--data", zoo_data, "--resume", zoo_best, "--no-cuda",
                           "--output", tmp_path / flag.strip("-"))  # fmt: skip
        assert done.code == 0, done.err
        mine = read_result(tmp_path / flag.strip("-") / "result.json")["measured"]["test"]
        theirs = read_result(zoo_trained[0] / "result.json")["measured"]["test"]
        assert mine["confusion"] == theirs["confusion"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_tables_agree_with_a_count_by_hand(zoo_folder, zoo_best, zoo_command, tmp_path):
    """Images put into a wrong folder are the mistakes, each listed once."""
    data = zoo_folder(tmp_path / "data")
    for index in range(2):
        source = data / "test" / "red" / f"{index:02d}.png"
        source.rename(data / "test" / "blue" / f"was_red_{index}.png")
    done = zoo_command("-e", "--data", data, "--resume", zoo_best, "--no-cuda",
                       "--output", tmp_path / "e")  # fmt: skip
    assert done.code == 0, done.err
    test = read_result(tmp_path / "e" / "result.json")["measured"]["test"]
    matrix = np.array(test["confusion"])
    assert matrix.sum() == 15 and matrix[0].sum() == 7 and matrix[2].sum() == 3
    rows = list(csv.DictReader((tmp_path / "e" / "misclassified.csv").open()))
    assert len(rows) == matrix.sum() - np.trace(matrix)
    assert {"test/blue/was_red_0.png", "test/blue/was_red_1.png"} <= {r["path"] for r in rows}
    chances = [float(row["probability of predicted"]) for row in rows]
    assert chances == sorted(chances, reverse=True)
    classes = {r["class"]: r for r in csv.DictReader((tmp_path / "e" / "per_class.csv").open())}
    assert float(classes["blue"]["recall"]) == pytest.approx(matrix[0, 0] / 7, abs=1e-6)
    assert float(classes["red"]["precision"]) == pytest.approx(
        matrix[2, 2] / max(matrix[:, 2].sum(), 1), abs=1e-6
    )
    assert (tmp_path / "e" / "misclassified.png").stat().st_size > 0


def test_modes_combine_after_a_training(zoo_words, zoo_command, tmp_path):
    run = tmp_path / "run"
    done = zoo_command(
        *zoo_words(run, "--visual_data", "test", "--visual_method", "all", "--visual_number", 4),
        *("--knowledge", "train", "--make_curriculum", "val", "--knowledge_dir", tmp_path / "k"),
        "--summary",
    )
    assert done.code == 0, done.err
    assert (run / "visual_images" / "contact_sheet.png").stat().st_size > 0
    assert len(list((run / "visual_images").glob("test_*.png"))) == 4
    for name in ("distill.txt", "label.txt", "curriculum.txt"):
        assert (tmp_path / "k" / name).stat().st_size > 0
    assert "MACs" in done.out


def test_without_a_mode_it_prints_the_summary_and_needs_no_data(zoo_command):
    done = zoo_command("-a", "resnet18")
    assert done.code == 0, done.err
    assert "11,179,590" in done.out.replace(" ", "")  # resnet18 with 6 classes


def test_the_lr_range_test_writes_its_curve(zoo_words, zoo_command, tmp_path):
    useless = ("--train", "--no-floor")
    words = [word for word in zoo_words(tmp_path / "lr") if word not in useless]
    done = zoo_command(*words, "--find_lr", 12, "--opt", "sgd", "--aug")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "lr" / "lr_range.json").read_text())
    assert found["lrs"][0] == pytest.approx(1e-6) and len(found["losses"]) <= 12
    assert (tmp_path / "lr" / "lr_range.png").stat().st_size > 0


def test_resume_starts_from_weights_and_replaces_a_head_of_another_size(
    zoo_best, zoo_folder, zoo_command, zoo_words, tmp_path
):
    data = zoo_folder(tmp_path / "data")
    for part in ("train", "val", "test"):
        shutil.rmtree(data / part / "red")
    done = zoo_command(
        *zoo_words(tmp_path / "run", "--resume", zoo_best, "--lr", "1e-12", "--wd", 0, data=data)
    )
    assert done.code == 0, done.err
    assert "head" in done.out and "2 classes" in done.out
    old, _ = load_checkpoint(zoo_best)
    new, _ = load_checkpoint(tmp_path / "run" / "checkpoints" / f"checkpoint_{ARCH}.pth")
    same = [k for k in old if old[k].shape == new[k].shape and old[k].is_floating_point()
            and "running" not in k]  # fmt: skip
    assert len(same) > 10
    for name in same:  # the rate is as good as nothing, so these are the weights it began with
        torch.testing.assert_close(old[name], new[name], atol=1e-6, rtol=0)


def test_jit_and_onnx_give_the_network_s_numbers(zoo_best, zoo_data, zoo_command, tmp_path):
    done = zoo_command("--jit", "--data", zoo_data, "--resume", zoo_best, "--no-cuda",
                       "--output", tmp_path / "j")  # fmt: skip
    assert done.code == 0, done.err
    files = {path.name for path in (tmp_path / "j" / "checkpoints").iterdir()}
    assert {f"jit_{ARCH}.pt", f"{ARCH}.onnx", f"{ARCH}.pt2"} <= files
    from torch_cls_zoo.models import build_model

    weights, _ = load_checkpoint(zoo_best)
    net = build_model(ARCH, num_classes=3, image_size=(24, 24)).model.eval()
    net.load_state_dict(weights)
    images = torch.randn(2, 3, 24, 24)
    opened = open_model(tmp_path / "j" / "model", runtime="onnx")
    view = opened.view(cv2.imread(str(zoo_data / "test" / "red" / "00.png"))[..., ::-1])[None]
    pixels = opened.facts.normalise(view)
    with torch.no_grad():
        want = net(torch.from_numpy(pixels)).softmax(1).numpy()
        np.testing.assert_allclose(opened.probabilities(view), want, atol=1e-4)
        loaded = torch.jit.load(str(tmp_path / "j" / "checkpoints" / f"jit_{ARCH}.pt"))
        torch.testing.assert_close(loaded(images), net(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "--data", "DATA", "--num_classes", "4"], "3 classes"),
        (["--train", "--data", "DATA", "-a", "resnet19"], "resnet19"),
        (["--train", "--data", "NOWHERE"], "no such folder"),
        (["--train", "--data", "DATA", "--weighted_loss"], "--class_matrices"),
        (["--train", "--data", "DATA", "--weighted_loss", "--class_matrices", "MATRIX"], "2 x 2"),
        (["-e", "--data", "DATA", "--resume", "JUNK"], "junk.pth"),
        (["-e", "--data", "DATA", "--resume", "BEST", "-a", "resnet18"], "--arch says resnet18"),
        (["-e", "--data", "TWO", "--resume", "BEST"], "knows 3 classes, the data has 2"),
        (["--train", "--data", "DATA", "--distill"], "distill*.txt"),
        (["--train", "--data", "DATA", "--curriculum_learning"], "curriculum.txt"),
        (["--train", "--data", "DATA", "--opt", "adamm"], "adamm"),
        (["--visual_data", "test", "--data", "DATA", "--resume", "BEST", "--visual_layer", "x"],
         "layer"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line(
    words, message, zoo_data, zoo_best, zoo_folder, zoo_command, tmp_path
):
    (tmp_path / "matrix.yaml").write_text("weights: [[1, 2], [2, 1]]\n")
    (tmp_path / "junk.pth").write_bytes(b"no weights")
    if "TWO" in words:
        two = zoo_folder(tmp_path / "two")
        for part in ("train", "val", "test"):
            shutil.rmtree(two / part / "red")
    places = {"DATA": zoo_data, "BEST": zoo_best, "MATRIX": tmp_path / "matrix.yaml",
              "JUNK": tmp_path / "junk.pth", "TWO": tmp_path / "two",
              "NOWHERE": tmp_path / "nowhere"}  # fmt: skip
    done = zoo_command(*[places.get(word, word) for word in words], "--no-cuda", "--image_size",
                       24, 24, "--output", tmp_path / "o")  # fmt: skip
    assert done.code in (1, 2) and done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1 and message in done.err


def test_a_loss_that_is_not_finite_is_one_line(zoo_words, zoo_command, tmp_path):
    done = zoo_command(*zoo_words(tmp_path / "r", "--lr", "1e30", "--opt", "sgd"))
    assert done.code == 1 and "--lr" in done.err and done.err.count("\n") == 1


def test_a_run_is_not_written_over(zoo_trained, zoo_words, zoo_command):
    before = (zoo_trained[0] / "result.json").read_bytes()
    done = zoo_command(*zoo_words(zoo_trained[0]))
    assert done.code == 1 and "already holds a run" in done.err
    assert (zoo_trained[0] / "result.json").read_bytes() == before


def test_corrupt_images_do_not_stop_a_run(zoo_folder, zoo_words, zoo_command, tmp_path):
    data = zoo_folder(tmp_path / "data")
    (data / "train" / "red" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (data / "test" / "blue" / "01.png").write_bytes(b"")
    done = zoo_command(*zoo_words(tmp_path / "run", "--epochs", 2, data=data))
    assert done.code == 0, done.err
    assert "left out 2 files" in done.err
    listed = (tmp_path / "run" / "quarantine.txt").read_text()
    assert "train/red/00.png" in listed and "test/blue/01.png" in listed
    assert read_result(tmp_path / "run" / "result.json")["measured"]["test"]["images"] == 14


def test_images_damaged_after_the_check_are_counted_and_listed(
    zoo_folder, zoo_best, zoo_words, zoo_command, tmp_path
):
    """A file that goes bad during a run: the split stands, the image is left out and named."""
    data = zoo_folder(tmp_path / "data")
    run = tmp_path / "run"
    first = zoo_command("-e", "--data", data, "--resume", zoo_best, "--no-cuda", "--output", run)
    assert first.code == 0
    (data / "test" / "blue" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    done = zoo_command("-e", "--data", data, "--resume", zoo_best, "--no-cuda", "--output", run)
    assert done.code == 0, done.err
    assert "1 unreadable" in done.out
    assert (run / "unreadable.txt").read_text() == "test/blue/01.png\n"
    assert read_result(run / "result.json")["measured"]["test"]["images"] == 14


def test_a_folder_that_is_worked_in_is_entered_by_nobody_else(
    zoo_words, zoo_best, zoo_data, zoo_command, tmp_path
):
    run = tmp_path / "run"
    use = ["-e", "--data", zoo_data, "--resume", zoo_best, "--no-cuda", "--output", run]
    with RunLock(run):
        for words in (zoo_words(run), zoo_words(run, "--fresh"), use):
            done = zoo_command(*words)
            assert done.code == 1 and "is in use by process" in done.err
    assert not [path for path in run.iterdir() if path.name != ".lock"]
