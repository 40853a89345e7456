"""The command: a whole run, its stages, its refusals, the teacher that knows nothing."""

from __future__ import annotations

import json

import pytest
import torch

from mpkd.experiments.recipes import FOLDER
from mpkd.options import parse
from mpkd.trainer.metrics_logger import read_metrics_csv
from mpkd.utils.common import load_net
from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.runs import RunLock, UsageError, read_result


def test_a_whole_run_leaves_everything(finished):
    folder, done = finished
    lines = done.out.strip().splitlines()
    assert lines[0].startswith("REHEARSAL") and lines[-1].startswith(lines[0])
    assert "not a reproduction" in lines[0]
    record = read_result(folder / "result.json")
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    measured = record["measured"]
    stages = {"prepare", "teacher", "distil", "quantize", "export", "analyze"}
    assert set(measured) == stages | {"floors", "verdicts"}
    assert lines[-1].endswith(" ".join(measured["verdicts"]))
    student, facts = load_net(folder / "checkpoints" / "student.pth")
    assert facts["metrics"]["test_accuracy"] == measured["distil"]["test_accuracy"]
    assert facts["split_hash"] == record["data"]["split_hash"] and not student.training
    share = measured["distil"]["parameters"] / measured["teacher"]["parameters"]
    assert share < 0.1 and measured["teacher"]["test_accuracy"] > 0.15
    (csv,) = (folder / "logs").glob("*.csv")
    rows = read_metrics_csv(csv)
    assert [r["stage"] for r in rows] == ["distil"] * 2  # the teacher was finished already
    assert all(0 <= r["agreement"] <= 1 and r["run_id"] == csv.stem for r in rows)
    assert "REHEARSAL" in csv.with_suffix(".log").read_text()


def test_quantized_student_is_rebuilt_from_its_file(finished):
    folder, _ = finished
    stages = json.loads((folder / "stages.json").read_text())
    net, facts = load_net(folder / "checkpoints" / "student_quantized.pth")
    plain, _ = load_net(folder / "checkpoints" / "student.pth")
    assert set(facts["quantization"]["w_bits"].values()) == {8}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = (net(images) - plain(images)).abs().max() / plain(images).abs().max()
    assert 0 < gap < 0.2  # eight bits: near, and not the same
    packed, told = load_net(folder / "checkpoints" / "student_packed.safetensors")
    with torch.no_grad():
        assert torch.equal(packed(images), net(images))
    size = (folder / "checkpoints" / "student_packed.safetensors").stat().st_size
    assert stages["quantize"]["bytes"] == size and told["quantization"] == facts["quantization"]
    assert abs(stages["quantize"]["test_accuracy"] - stages["distil"]["test_accuracy"]) <= 0.05


def test_stages_alone_and_what_they_need(tmp_path, words, command):
    folder = tmp_path / "run"
    for stage, wanted in (("distil", "no teacher"), ("quantize", "no student"),
                          ("export", "no student"), ("analyze", "no student")):  # fmt: skip
        done = command(*words(folder, "--stage", stage))
        assert done.code == 2 and wanted in done.err and done.err.count("\n") == 1
        assert not folder.exists()  # a first run that failed leaves nothing behind
    assert command(*words(folder, "--stage", "prepare")).code == 0
    done = command(*words(folder, "--stage", "distil", "--continue", distillation__mode="labels"))
    assert done.code == 1 and "distillation.mode=" in done.err  # another run's settings


def test_a_folder_has_one_process_at_a_time(tmp_path, words, command):
    folder = tmp_path / "run"
    assert command(*words(folder, "--stage", "prepare")).code == 0
    with RunLock(folder):
        for how in ("--continue", "--fresh", "--resume"):
            done = command(*words(folder, how))
            assert done.code == 1 and "in use by process" in done.err, done.err
    assert (folder / "split.json").exists()


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        (("--epochs", "7"), "experiment.epochs", 7),
        (("--batch-size", "5"), "experiment.batch_size", 5),
        (("--lr", "0.5"), "experiment.learning_rate", 0.5),
        (("--seed", "9"), "experiment.seed", 9),
        (("--device", "cpu"), "experiment.device", "cpu"),
        (("--workers", "0"), "dataset.workers", 0),
        (("--threads", "2"), "experiment.threads", 2),
        (("--input-size", "24"), "dataset.image_size", 24),
        (("--amp", "fp16"), "mixed_precision.dtype", "fp16"),
        (("--max-accuracy-loss", "0.02"), "export.max_accuracy_loss", 0.02),
        (("--init", "t.pth"), "model.teacher_ckpt", "t.pth"),
        (("--init", "none"), "model.teacher_ckpt", "none"),
        (("--init", "none"), "model.student_ckpt", "none"),
        (("--data-path", "photos"), "dataset.data_dir_folder", "photos"),
        (("--data-path", "photos"), "dataset.name", "folder"),
        (("--data-path", "CIFAR-10"), "dataset.data_dir_cifar10", "CIFAR-10"),
        (
            ("--data-path", "photos", "--set", "dataset.name=imagenet"),
            "dataset.data_dir_imagenet", "photos",
        ),
    ],
)  # fmt: skip
def test_common_options_are_keys_of_the_configuration(tmp_path, monkeypatch, option, key, value):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "CIFAR-10"):
        (tmp_path / name).mkdir()
    usual, found = (parse(words).config for words in ((), option))
    assert found[key] == value != usual[key]
    moved = {name for name in usual if usual[name] != found[name]}
    beside = {
        "--data-path": {"dataset.name", "model.teacher_model", *FOLDER},
        "--init": {"model.teacher_ckpt", "model.student_ckpt"},
    }
    assert moved <= {key, "dataset.data_dir_folder", *beside.get(option[0], ())}
    if option == ("--init", "t.pth"):
        assert moved == {key}
    if found["dataset.name"] == "folder":  # images of one's own have a recipe of their own
        assert found["model.student_model"] == "lite0"


def test_one_key_is_said_once(tmp_path):
    with pytest.raises(UsageError, match="--epochs and --set experiment.epochs: expected one"):
        parse(["--epochs", "3", "--set", "experiment.epochs=4"])
    with pytest.raises(FileNotFoundError, match="--data-path"):
        parse(["--data-path", str(tmp_path / "none")])
    with pytest.raises(UsageError, match="dataset.name is digits"):
        parse(["--scale", "rehearsal", "--data-path", str(tmp_path)])


def test_a_folder_of_ones_own_with_a_split_of_ones_own(tmp_path, words, command, image_folder):
    """``--data-path`` and ``--split``: the manifest says who is judged."""
    images = image_folder(tmp_path / "photos", ("a", "b", "c"), images=12)
    first = tmp_path / "first"
    settings = [w for w in words(first, "--stage", "prepare") if w not in ("--scale", "rehearsal")]
    assert command(*settings, "--data-path", images).code == 0
    manifest = json.loads((first / "split.json").read_text())
    given = tmp_path / "given.json"
    given.write_bytes((first / "split.json").read_bytes())
    second = [word if word != str(first) else str(tmp_path / "second") for word in settings]
    extra = image_folder(tmp_path / "more", ("a",), images=14)  # a class that grew meanwhile
    (extra / "a" / "013.png").rename(images / "a" / "new.png")
    done = command(*second, "--data-path", images, "--split", given)
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "second" / "split.json").read_text())
    assert again == manifest and "new.png" not in json.dumps(again)


@pytest.mark.parametrize(
    ("more", "changes", "code", "said"),
    [
        (["--set", "experiment.epoch=3"], {}, 2, "perhaps experiment.epochs"),
        (["--set", "experiment.learning_rate=1e-4"], {}, 2, "write 1.0e-4"),
        (["--resume", "--fresh"], {}, 2, "expected one of them"),
        (["--config", "none.yaml"], {}, 1, "there is no such file"),
        ([], {"experiment__device": "gpu"}, 2, "expected auto, cpu"),
        ([], {"experiment__device": "cuda:7"}, 2, "no such GPU"),
        ([], {"dataset__name": "cifar10"}, 2, "expected digits"),
        ([], {"model__student_model": "resnet1"}, 1, "network 'resnet1'"),
        ([], {"model__teacher_ckpt": "none.pth"}, 2, "none.pth: there is no such file"),
        ([], {"model__student_ckpt": "none.pth"}, 2, "none.pth: there is no such file"),
        ([], {"model__teacher_size": 4}, 2, "expected the student's 8 or more"),
        ([], {"teacher__mode": "head"}, 2, "expected model.teacher_ckpt"),
        ([], {"distillation__loss": "dist", "training__gradient_accumulation_steps": 2}, 2, "dist"),
        (["--resume"], {}, 1, "nothing to resume"),
        (
            [], {"distillation__mode": "apprentice_c", "quantization__method": "brecq"}, 2,
            "expected qat or none",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, command, more, changes, code, said):
    monkeypatch.chdir(tmp_path)
    changes = {"distillation__mode": "labels"} | changes if not changes else changes
    done = command(*words(tmp_path / "run", *more, **changes))
    assert done.code == code, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and said in done.err


def test_without_data_the_default_says_what_it_expects(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = command("--data-root", tmp_path)
    assert done.code == 1 and "CIFAR-10 is not at" in done.err and "rehearsal" in done.err


def test_a_teacher_that_knows_nothing_does_not_teach(tmp_path, words, command):
    done = command(*words(tmp_path / "run", teacher__learning_rate="1.0e-9"))
    assert done.code == 1 and "the teacher's validation accuracy" in done.err
    assert not (tmp_path / "run" / "checkpoints" / "student.pth").exists()


def test_a_student_that_is_no_student_is_refused(tmp_path, words, command, teacher_file):
    done = command(*words(
        tmp_path / "r", model__teacher_model="shufflenet_v2_x0_5", model__stem="standard",
        model__student_widths="[128,256]",
    ))  # fmt: skip
    assert done.code == 1 and "expected at most 10%" in done.err


@pytest.mark.parametrize("mode", ["labels", "mixed", "apprentice_a", "apprentice_b"])
def test_other_modes_run(tmp_path, words, command, teacher_file, mode):
    teacher = "" if mode == "apprentice_a" else teacher_file
    more = {"quantization__method": "qat", "quantization__w_bits": 4, "quantization__a_bits": 4}
    apprentice = mode.startswith("apprentice")
    folder = tmp_path / "run"
    done = command(*words(
        folder, distillation__mode=mode, model__teacher_ckpt=teacher, quantization__epochs=1,
        **(more if apprentice else {}),
    ))  # fmt: skip
    assert done.code == 0, done.err
    _, facts = load_net(folder / "checkpoints" / "student.pth")
    if apprentice:  # few bits from the start, 8 in the first and the last layer
        assert sorted(set(facts["quantization"]["w_bits"].values())) == [4, 8]
        assert "has its bits already" in done.out
    else:
        assert facts["quantization"] is None


@pytest.mark.slow
def test_an_apprentice_of_two_bits_learns(tmp_path, words, command):
    """Its first and last layer have 8 bits, whose scales are smaller than the learning rate."""
    folder = tmp_path / "run"
    done = command(*words(
        folder, distillation__mode="apprentice_b", teacher__epochs=2,
        teacher__learning_rate=1.0e-2,
        quantization__method="qat", quantization__w_bits=2, quantization__a_bits=4,
        experiment__epochs=8, experiment__learning_rate=5.0e-3, dataset__max_images=600,
        model__student_widths="[16,32]",
    ))  # fmt: skip
    assert done.code == 0, done.err
    net, facts = load_net(folder / "checkpoints" / "student.pth")
    assert facts["metrics"]["test_accuracy"] > 0.5  # 0.1 is a guess
    scales = [p for n, p in net.named_parameters() if n.endswith("_quantizer.scale")]
    assert scales and all(float(scale.min()) > 0 for scale in scales)


def test_apprentice_c_lowers_a_trained_student(tmp_path, words, command, teacher_file):
    folder = tmp_path / "run"
    done = command(*words(
        folder, distillation__mode="apprentice_c", model__teacher_ckpt=teacher_file,
        quantization__method="qat", quantization__w_bits=2, quantization__epochs=1,
    ))  # fmt: skip
    assert done.code == 0, done.err
    stages = json.loads((folder / "stages.json").read_text())
    assert list(stages).index("student_labels") < list(stages).index("distil")
    first, facts = load_net(folder / "checkpoints" / "student_labels.pth")
    _, lowered = load_net(folder / "checkpoints" / "student.pth")
    assert facts["quantization"] is None and 2 in lowered["quantization"]["w_bits"].values()


def test_lora_on_the_teacher_leaves_norms_as_they_are(tmp_path, words, command, teacher_file):
    weights, _ = load_checkpoint(teacher_file)
    torch.save(weights, tmp_path / "plain.pth")  # weights from elsewhere: to be fine-tuned
    folder = tmp_path / "run"
    done = command(*words(
        folder, "--stage", "teacher", model__teacher_ckpt=tmp_path / "plain.pth",
        teacher__mode="lora", lora__r=2, lora__target_modules="[classifier, features.1.0]",
    ))  # fmt: skip
    assert done.code == 0, done.err
    tuned, _ = load_checkpoint(folder / "checkpoints" / "teacher.pth")
    moved = {name for name in weights if not torch.equal(weights[name], tuned[name])}
    assert moved == {"classifier.weight", "features.1.0.weight"}
    adapters, _ = load_checkpoint(folder / "checkpoints" / "adapters.pth")
    assert len(adapters) == 4


def test_only_the_head_is_tuned_where_it_is_asked(tmp_path, words, command, teacher_file):
    weights, _ = load_checkpoint(teacher_file)
    torch.save(weights, tmp_path / "plain.pth")
    folder = tmp_path / "run"
    done = command(*words(
        folder, "--stage", "teacher", model__teacher_ckpt=tmp_path / "plain.pth",
        teacher__mode="head",
    ))  # fmt: skip
    assert done.code == 0, done.err
    tuned, _ = load_checkpoint(folder / "checkpoints" / "teacher.pth")
    moved = {name for name in weights if not torch.equal(weights[name], tuned[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_lora_on_the_student(tmp_path, words, command, teacher_file):
    folder = tmp_path / "run"
    done = command(*words(
        folder, model__teacher_ckpt=teacher_file, teacher__mode="lora", lora__target="student",
        lora__r=2,
    ))  # fmt: skip
    assert done.code == 0, done.err
    base, _ = load_checkpoint(folder / "checkpoints" / "student_base.pth")
    student, _ = load_checkpoint(folder / "checkpoints" / "student.pth")
    adapters, facts = load_checkpoint(folder / "checkpoints" / "adapters.pth")
    assert set(base) == set(student) and facts["architecture"] == "adapters"
    assert all(".lora_" in name for name in adapters)
    for name, value in base.items():
        adapted = f"{name.rpartition('.')[0]}.lora_a" in adapters and name.endswith("weight")
        if not adapted:  # norms, their statistics and biases stay bit for bit
            assert torch.equal(value, student[name]), name
    a, b = adapters["classifier.lora_a"].double(), adapters["classifier.lora_b"].double()
    merged = base["classifier.weight"].double() + 16.0 / 2 * (b @ a)
    torch.testing.assert_close(student["classifier.weight"].double(), merged, rtol=0, atol=1e-5)


def test_unlabelled_images_teach(tmp_path, words, command, teacher_file, image_folder):
    extra = image_folder(tmp_path / "extra", ("x",), images=20, size=8)
    done = command(*words(
        tmp_path / "run", model__teacher_ckpt=teacher_file, dataset__unlabelled=f"[{extra}]"
    ))  # fmt: skip
    assert done.code == 0, done.err
    record = read_result(tmp_path / "run" / "result.json")
    assert record["data"]["splits"]["unlabelled"] == 20
    (csv,) = (tmp_path / "run" / "logs").glob("*.csv")
    assert all(row["train_acc"] is None for row in read_metrics_csv(csv))
