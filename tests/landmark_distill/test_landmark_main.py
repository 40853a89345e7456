"""The command: names of folders and files, lines of the record, bad flags, bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from command_tools import without
from landmark_distill import main
from landmark_distill.config import NetworkConfig
from landmark_distill.model_files import load_model
from landmark_distill.parsing import parse
from landmark_distill.utils import epoch_line, interval
from shared_core.runs import RunLock, read_metrics, read_result


def options(*words: str):
    return parse([*words], prog="main.py")


def test_folders_are_named_as_the_readme_shows(tmp_path):
    (tmp_path / "t.pth").touch()
    teacher = ("--teacher_init_weights", str(tmp_path / "t.pth"), "--save_dir", "S")
    found = options("--recipe", "swin-tiny", *teacher).folder
    assert found == Path(
        "S/TLD-Swin_tiny-KD-1.0/lr0.001_AdamW_cosine_epoch200_warmup10_bs256-head_fixed"
    )
    found = options("--recipe", "resnet12", *teacher).folder
    assert found == Path("S/TLD-Resnet12-KD-1.0/lr0.01_SGD_cosine_epoch40_warmup0_bs256-head_fixed")
    found = options(
        "--init_weights", str(tmp_path / "t.pth"), "--suffix=-x", "--lr", "0.00125",
        "--lr_scheduler", "step", "--step_size", "30",
    ).folder  # fmt: skip
    assert found.as_posix().endswith(
        "TLD-Resnet12-no_distill-Pre-NoAug/lr0.0013_SGD_step30_gamma0.5_epoch100_warmup0_bs4-x"
    )


def test_recipes_win_over_defaults_and_flags_over_recipes(tmp_path):
    (tmp_path / "t.pth").touch()
    run = options(
        *("--recipe", "swin-tiny", "--teacher_init_weights", str(tmp_path / "t.pth")),
        *("--lr", "0.5", "--batch_size", "8"),
    )
    rate, taught = run.train.schedule, run.distill
    assert (rate.lr, rate.max_epoch, rate.warmup) == (0.5, 200, 10)
    assert (run.train.batch_size, run.train.optimizer) == (8, "AdamW")
    assert taught is not None and taught.head_fixed and taught.loss == "KD"
    assert taught.backbone == "Swin_base" and run.views.augment
    assert run.network == NetworkConfig("Swin_tiny", 384, 1024, 32.0, 0.1)


def test_a_folder_alone_tunes_a_trained_network_and_a_teacher_makes_it_learn_features(tmp_path):
    (tmp_path / "t.pth").touch()
    folder = ("--data-path", str(tmp_path))
    run = options(*folder, "--epochs", "2")
    assert run.network.name == "efficientnet_lite0" and run.views.augment and run.distill is None
    assert (run.train.choose_by, run.train.schedule.max_epoch) == ("auto", 2)
    assert run.data.hold_out.validation == 0.15
    taught = options(*folder, "--recipe", "lite0", "--teacher_init_weights", folder[1] + "/t.pth")
    assert taught.distill.head_fixed and taught.distill.loss == "cosine"
    assert taught.distill.backbone == "efficientnet_lite2"
    for words in (("--backbone_class", "Resnet12"), ("--recipe", "lite0", "--lr", "0.5")):
        other = options(*folder, *words)
        assert (other.network.name, other.train.schedule.lr) in (
            ("Resnet12", 1e-4), ("efficientnet_lite0", 0.5)
        )  # fmt: skip


def test_epoch_line_by_hand():
    line = epoch_line(
        3, 0.001, train_acc=0.5, eval_loss=1.25, eval_acc=0.8, eval_count=100, ce_loss=2, kd_loss=3
    )
    # 1.96 * sqrt(0.8 * 0.2 / 100) = 0.0784
    assert line == (
        "epoch 3  lr 0.001: train_acc=50.0000, eval_loss=1.2500, eval_acc=80.0000+7.8400, "
        "avg_ce_loss=2.0000, avg_kd_loss=3.0000"
    )
    assert interval(1.0, 10) == 0.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, landmark, landmark_tiny):
    folder = tmp_path_factory.mktemp("finished")
    done = landmark(*landmark_tiny(folder, "--augment", "--log_interval", 1))
    assert done.code == 0, done.err
    (run,) = [path.parent for path in folder.rglob("record.txt")]
    return run, done


def test_record_lines_in_their_order(finished):
    run, done = finished
    lines = (run / "record.txt").read_text().splitlines()
    number = r"\d+\.\d{4}"
    rates = r"\[" + ", ".join([r"(?:[01]\.\d{5}|-)"] * 8) + r"\]"
    patterns = [
        "path not exist!",
        "num_device: 1",
        "num_workers: 0",
        r"len\(train_loader\): \d+",
        r"len\(val_loader\): \d+",
        r"len\(test_loader\): \d+",
        r"torch.cuda.is_available\(\): (True|False)",
        "device: cpu",
        r"Resnet12 starts from nothing: .*",
        r"student para trainable/sum (\d+)/\1; teacher para trainable/sum 0/0",
        *[
            rf"epoch {e}  lr [\d.e-]+: train_acc={number}, eval_loss={number}, "
            rf"eval_acc={number}\+{number}, avg_ce_loss={number}, avg_kd_loss=0.0000"
            for e in (1, 2)
        ],
        rf"test acc: coarsegrained:{rates}--finegrained:{rates}",
        r"(BELOW|not below) trained features \(efficientnet_lite0 as it is, 32 px\).*",
    ]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert set(lines) <= set(done.out.splitlines())
    assert done.out.splitlines()[0].startswith("REHEARSAL")
    assert done.out.splitlines()[-1].startswith("REHEARSAL")


def test_record_json_metrics_and_features(finished):
    run, _ = finished
    result = read_result(run / "result.json")
    assert result["data"]["kind"] == "built-in" and result["scale"] == "rehearsal"
    assert result["task"] == "landmark_distill/tld" and result["seeds"] == [0]
    lines = read_metrics(run / "metrics.jsonl")
    assert [(x["split"], x["step"]) for x in lines if x["split"] != "step"] == [
        ("train", 1), ("val", 1), ("train", 2), ("val", 2)
    ]  # fmt: skip
    steps = [x["step"] for x in lines if x["split"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    train = next(x for x in lines if x["split"] == "train")
    assert 0 <= train["acc"] <= 1 and train["loss"] == pytest.approx(train["ce"])
    features = np.load(run / "opensetFeat.npy")
    assert features.shape == (result["data"]["splits"]["test"], 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_the_record_says_coarse_of_the_groups_and_fine_of_the_classes(finished):
    """By the folders of the test images, and the features that lie there."""
    run, _ = finished
    split = json.loads((run / "split.json").read_text())
    paths = [path for path, _, _, part in split["samples"] if part == "test"]
    features = np.load(run / "opensetFeat.npy").astype(np.float64)
    i, j = np.triu_indices(len(paths), 1)
    scores = (features[i] * features[j]).sum(1)
    shown = read_result(run / "result.json")["measured"]["open_set"]
    rates = {}
    for name, depth in (("coarse", 1), ("fine", 2)):
        folders = np.array(["/".join(path.split("/")[:depth]) for path in paths])
        genuine = folders[i] == folders[j]
        bad = np.sort(scores[~genuine])[::-1]
        limit = bad[int(len(bad) * 0.1 + 1e-9)]
        rates[name] = np.mean(scores[genuine] > limit)
        assert shown["rates"][name][0] == pytest.approx(rates[name], abs=1.01 / genuine.sum())
        assert shown["verification"][name]["genuine_pairs"] == genuine.sum()
        enough = [far * len(bad) >= 1 - 1e-9 for far in (0.1, 0.01, 1e-3, 1e-4)]
        assert shown["measurable"][name][:4] == enough
    assert rates["coarse"] != rates["fine"]  # or the test would not see them swapped


def test_best_file_is_the_student_alone_and_says_what_it_is(finished):
    run, _ = finished
    model, facts = load_model(run / "max_acc.pth")
    assert facts is not None and facts["architecture"] == "Resnet12"
    assert facts["input_size"] == [3, 32, 32] and facts["bgr"] is False
    content = torch.load(run / "max_acc.pth", weights_only=True)
    prefixes = {name.split(".")[0] for name in content["model"]}
    assert prefixes == {"encoder", "head"}  # its own head is part of it
    assert model.head is not None and model.head.num_classes == len(facts["class_names"])
    assert load_model(run / "last.pth")[1]["epoch"] == 2


def test_a_test_sees_what_the_file_says(finished, landmark, landmark_tiny, tmp_path, file_of):
    """Not what the options' defaults are; an option that says otherwise is refused."""
    run, _ = finished
    words = without(
        landmark_tiny(tmp_path, "--test_only", "--init", run / "max_acc.pth", "--split",
                      run / "split.json", "--data-path", run / "data" / "scenes"),
        "--image_size", "--feature_dim", "--builtin_classes", "--builtin_images", "--test_share",
    )  # fmt: skip
    done = landmark(*words)
    assert done.code == 0, done.err
    found = np.load(file_of(tmp_path, "opensetFeat.npy"))
    assert np.array_equal(found, np.load(run / "opensetFeat.npy"))
    assert read_result(file_of(tmp_path, "result.json"))["data"]["pixels"] == 32
    for option, value, named in (
        ("--image_size", "64", "--input-size 64"),
        ("--backbone_class", "Swin_tiny", "--backbone_class Swin_tiny"),
        ("--resize", "area", "--resize area"),
        ("--drop_block", "3", "--drop_block 3"),
    ):
        done = landmark(*words, option, value)
        assert done.code == 2 and f"error: {named}: " in done.err, done.err
    assert landmark(*words, "--image_size", "32").code == 0  # the same is no contradiction


def test_test_only_gives_the_same_features(finished, landmark, landmark_tiny, tmp_path, file_of):
    run, _ = finished
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    done = landmark(
        *landmark_tiny(tmp_path, "--test_only", "--init_weights", run / "max_acc.pth", "--augment")
    )
    assert done.code == 0, done.err
    assert "-Pre/" in str(file_of(tmp_path, "record.txt"))
    assert not list(tmp_path.rglob("*.pth*"))
    found = np.load(file_of(tmp_path, "opensetFeat.npy"))
    assert np.array_equal(found, np.load(run / "opensetFeat.npy"))
    last = (run / "record.txt").read_text().splitlines()[-2:]  # the test, and the floor
    assert file_of(tmp_path, "record.txt").read_text().splitlines() == last
    assert {p: p.read_bytes() for p in before} == before


def test_a_second_run_does_not_write_over_the_first(finished, landmark, landmark_tiny):
    run, _ = finished
    words = landmark_tiny(run.parents[1], "--augment", "--log_interval", 1)
    done = landmark(*words)
    assert done.code == 1 and "already holds a run" in done.err
    done = landmark(*words, "--resume", "auto")
    assert done.code == 0 and "finished before" in done.out
    done = landmark(*words, "--resume", "auto", "--weight_decay", "0.1")
    assert done.code == 1 and "weight_decay" in done.err
    done = landmark(*words, "--resume", "--suffix=-other")
    assert done.code == 1 and "nothing to resume" in done.err


def test_two_processes_do_not_share_a_run(finished, landmark, landmark_tiny):
    run, _ = finished
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    words = landmark_tiny(run.parents[1], "--augment", "--log_interval", 1)
    with RunLock(run):
        for start in ("--fresh", "--continue", "--resume"):
            done = landmark(*words, start)
            assert done.code == 1 and "is in use by process" in done.err
    assert {p: p.read_bytes() for p in before} == before


def test_a_first_run_that_fails_blocks_nobody(landmark, landmark_tiny, tmp_path):
    words = without(landmark_tiny(tmp_path), "--save_dir")
    done = landmark(*words, "--lr", "1e30", "--output", tmp_path / "run")
    assert done.code == 1 and "smaller --lr" in done.err and not (tmp_path / "run").exists()
    done = landmark(*words, "--output", tmp_path / "run")
    assert done.code == 0 and (tmp_path / "run" / "max_acc.pth").exists(), done.err


BAD = [
    (["--test_only"], "--init"),
    (["--is_distill"], "--teacher_backbone_class"),
    (["--is_distill", "--teacher_backbone_class", "Resnet12"], "--teacher_init_weights"),
    (["--head_fixed"], "--head_fixed would have no effect"),
    (["--kd_weight", "2"], "--kd_weight would have no effect"),
    (["--knowledge", "k"], "--knowledge would have no effect"),
    (["--ce_weight", "0"], "leaves nothing to learn from"),
    (["--step_size", "10"], "--step_size would have no effect"),
    (["--lr_scheduler", "step", "--step_size", "a"], "expected epochs"),
    (["--lr_scheduler", "step", "--min_lr", "0"], "--min_lr would have no effect"),
    (["--optim", "Adam", "--momentum", "0.9"], "--momentum would have no effect"),
    (["--warmup_epoch", "500"], "expected fewer"),
    (["--hflip", "0"], "--hflip would have no effect"),
    (["--lighting_order", "original", "--augment"], "--bgr"),
    (["--crop_scale", "0.9", "0.5", "--augment"], "expected 0 < low"),
    (["--fresh", "--resume"], "expected one of them"),
    (["--resume", "maybe"], "expected True, False or auto"),
    (["--dataset", "a/b"], "--dataset"),
    (["--lr", "0"], "expected (0"),
    (["--backbone_class", "Resnet18"], "expected one of Swin_base"),
    (["--train_list", "l"], "--train_root"),
    (["--multi_gpu"], "GPU"),
    (["--builtin_classes", "8", "--data_path", "."], "--builtin_classes would have no effect"),
    (["--layout", "class"], "--layout would have no effect"),
    (["--test_groups", "a", "--test_share", "0.5"], "--test_share would have no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_usage_is_one_line_and_code_2(landmark, tmp_path, words, named):
    if words == ["--multi_gpu"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = landmark(*words, "--save_dir", tmp_path / "s")
    assert done.code == 2 and named in done.err, done.err
    assert "Traceback" not in done.err and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--init_weights", "--init"), ("--data_path", "--data-path"), ("--split_file", "--split"),
        *[(flag, flag) for flag in ("--teacher_init_weights", "--remap", "--init", "--split")],
    ],
)  # fmt: skip
def test_missing_files_are_named(landmark, tmp_path, typed, named):
    done = landmark(typed, tmp_path / "none")
    assert done.code == 1 and f"error: {named} {tmp_path / 'none'}: there is no such" in done.err


def test_weights_that_do_not_fit_are_named(finished, landmark, landmark_tiny, tmp_path):
    run, _ = finished
    words = landmark_tiny(tmp_path, "--init_weights", run / "max_acc.pth")
    done = landmark(*words, "--feature_dim", "24")
    assert done.code == 1 and "do not fit" in done.err and "has shape" in done.err
    content = torch.load(run / "max_acc.pth", weights_only=True)["model"]
    gone = {k: v for k, v in content.items() if k != "encoder.layer1.conv1.weight"}
    torch.save({"params": gone}, tmp_path / "gone.pth")
    done = landmark(*landmark_tiny(tmp_path, "--init_weights", tmp_path / "gone.pth", "--fresh"))
    assert done.code == 1 and "layer1.conv1.weight is missing" in done.err
    torch.save({"params": {**content, "encoder.extra": torch.zeros(1)}}, tmp_path / "more.pth")
    done = landmark(*landmark_tiny(tmp_path, "--init_weights", tmp_path / "more.pth", "--fresh"))
    assert done.code == 1 and "extra is not known" in done.err


def test_weights_of_a_parallel_wrapper_fit(finished, landmark, landmark_tiny, tmp_path, file_of):
    run, _ = finished
    content = torch.load(run / "max_acc.pth", weights_only=True)["model"]
    torch.save({"params": {f"encoder.module.{k.removeprefix('encoder.')}": v
                           for k, v in content.items() if k.startswith("encoder.")}},
               tmp_path / "wrapped.pth")  # fmt: skip
    done = landmark(
        *landmark_tiny(tmp_path, "--test_only", "--init_weights", tmp_path / "wrapped.pth")
    )
    assert done.code == 0, done.err
    found = np.load(file_of(tmp_path, "opensetFeat.npy"))
    assert np.array_equal(found, np.load(run / "opensetFeat.npy"))


def test_channel_order_of_a_file_is_checked(finished, landmark, landmark_tiny, tmp_path):
    run, _ = finished
    words = landmark_tiny(tmp_path, "--test_only", "--init_weights", run / "max_acc.pth")
    done = landmark(*words, "--bgr")
    assert done.code == 1 and "expected no --bgr" in done.err


def test_lists_from_end_to_end(landmark, landmark_tiny, landmark_images, tmp_path, file_of):
    root = landmark_images(tmp_path / "images", ("a", "b", "c"))
    for name, groups in (("one", "a"), ("two", "b"), ("test", "c")):
        paths = sorted(p for g in groups for p in (root / g).rglob("*.png"))
        lines = [f"{p.relative_to(root).as_posix()}\tx\t{int(p.parent.name[-1])}\n" for p in paths]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    # The second list's class 1 (number 3) is the first's class 0.
    (tmp_path / "map.json").write_text(json.dumps({"3": [0, 1.0]}))
    words = [w for w in landmark_tiny(tmp_path / "s", "--remap", tmp_path / "map.json")]
    drop = words.index("--builtin_classes")
    words = words[:drop] + words[drop + 6 :]  # without built-in data and shares
    words += ["--train_list", tmp_path / "one.txt", tmp_path / "two.txt"]
    words += ["--train_root", root, root]
    words += ["--val_list", tmp_path / "one.txt", "--val_root", root]
    words += ["--test_list", tmp_path / "test.txt", "--test_root", root, "--bgr"]
    done = landmark(*words)
    assert done.code == 0, done.err
    model, facts = load_model(file_of(tmp_path / "s", "max_acc.pth"))
    assert model.head is not None and model.head.num_classes == 3 and facts["bgr"] is True
    result = read_result(file_of(tmp_path / "s", "result.json"))
    assert result["data"]["splits"] == {"train": 24, "calibration": 12, "test": 12}
    assert result["data"]["kind"] == "real"
    mask = tmp_path / "mask.npy"
    np.save(mask, np.zeros(5, dtype=np.uint8))
    done = landmark(*words, "--coarse_mask", mask, "--suffix=-m")
    assert done.code == 1 and "mask" in done.err and "66" in done.err
    shutil.rmtree(root / "c")
    done = landmark(*words, "--suffix=-n")
    assert done.code == 1 and "12 of 12 entries of" in done.err


def test_help_lists_every_flag_of_the_original(landmark):
    done = landmark("--help")
    assert done.code == 0
    for flag in (
        *("backbone_class", "dataset", "max_epoch", "warmup_epoch", "batch_size", "lr", "min_lr"),
        *("optim", "lr_scheduler", "step_size", "gamma", "augment", "multi_gpu", "init_weights"),
        *("weight_decay", "num_workers", "log_interval", "eval_interval", "save_dir", "suffix"),
        *("is_distill", "teacher_backbone_class", "teacher_init_weights", "kd_loss", "kd_weight"),
        *("resume", "head_fixed"),
    ):
        assert re.search(rf"--{flag}\b", done.out), flag
    assert callable(main.main)
