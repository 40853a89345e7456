"""Every word of the command line arrives where it acts: in the data, the views, a training."""

from __future__ import annotations

import json

import cv2
import numpy as np
import paddle
import pytest

from shared_core.datasets import DatasetError
from visiondistill_gc.config import parse
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.run import stages
from visiondistill_gc.utils.data_utils import prepare


class Stopped(ValueError):
    """Raised where a training would begin."""


@pytest.fixture
def caught(monkeypatch, command, tiny, tmp_path):
    """The training that a command comes to first."""

    def run(*words):
        found = []

        def stop(training):
            found.append(training)
            raise Stopped

        monkeypatch.setattr(stages, "fit", stop)
        with pytest.raises(Stopped):
            command(*tiny(tmp_path / "run"), "--no-visualdl", *words)
        return found[0]

    return run


VIEW = (
    *("--hflip", "1", "--vflip", "0.25", "--rotation", "7", "--crop-padding", "3"),
    *("--jitter", "0.1", "0.2", "0.4", "0.05", "--erasing", "0.6", "--crop-scale", "0.5", "0.9"),
)


def test_words_of_the_student_and_of_training(caught, tmp_path):
    paddle.seed(5)
    source = build_student(num_classes=2, scale=0.1, hidden=12, frozen=0)
    paddle.save(source.state_dict(), str(tmp_path / "start.pdparams"))
    training = caught(
        *VIEW, "--alpha", "1", "--temperature", "2", "--class-weights", "none",
        "--init", tmp_path / "start.pdparams", "--frozen", "3", "--no-freeze-bn",
        "--hidden", "12", "--dropout", "0.125", "--lr", "0.002", "--optimizer", "adamw",
        "--weight-decay", "0.3", "--clip-grad", "1.5", "--ema", "0.75", "--patience", "4",
        "--schedule", "epoch", "--label-smoothing", "0.2", "--save-every", "2", "--epochs", "6",
        "--batch-size", "5", "--workers", "0", "--input-size", "40", "--folds", "1",
    )  # fmt: skip
    view = training.loader.view.settings()
    assert (view["hflip"], view["vflip"], view["rotation"], view["padding"]) == (1, 0.25, 7, 3)
    assert view["jitter"] == [0.1, 0.2, 0.4, 0.05] and view["crop_scale"] == [0.5, 0.9]
    assert view["erasing"] == 0.6 and view["size"] == [40, 40]
    net, how, loss = training.net, training.plan.how, training.loss
    assert training.stage == "fold1" and training.teacher is None
    assert net.frozen == 3 and not net.freeze_bn and net.classifier[5].p == 0.125
    for name, value in source.state_dict().items():
        assert np.array_equal(net.state_dict()[name].numpy(), value.numpy()), name
    learned = {p.name for p in training.optimizer._parameter_list}
    assert not learned & {p.name for block in net.features[:3] for p in block.parameters()}
    assert isinstance(training.optimizer, paddle.optimizer.AdamW)
    assert training.optimizer._weight_decay == 0.3 and training.optimizer.get_lr() == 0.002
    assert (loss.temperature, loss.alpha, loss.class_weights) == (2, 1, None)
    assert (how.clip_grad, how.ema, how.patience, how.schedule) == (1.5, 0.75, 4, "epoch")
    assert (how.label_smoothing, how.save_every, how.epochs) == (0.2, 2, 6)
    assert training.plan.keep == "best"
    assert (training.loader.batch_size, training.loader.threads) == (5, 0)


def test_words_of_the_teacher(caught):
    training = caught(
        *VIEW, "--teacher", "mobilenet_v3_small", "--teacher-epochs", "3", "--teacher-lr", "0.03",
        "--teacher-batch-size", "6", "--patience", "4", "--optimizer", "adam",
        "--mixup", "0.7", "--mixup-start", "2", "--warmup-epochs", "1",
    )  # fmt: skip
    how = training.plan.how
    assert training.stage == "teacher0" and training.loss.alpha == 1
    assert type(training.net).__name__ == "MobileNetV3Small"
    assert (how.epochs, how.lr, how.patience, how.mixup) == (3, 0.03, 0, 0.7)
    assert training.optimizer.get_lr() == 0.03 and training.loader.batch_size == 6
    assert training.plan.keep == "last"  # nothing is chosen on the validation part
    assert training.loader.view.settings()["hflip"] == 1


def test_layers_are_frozen_above_trained_weights_only(tmp_path):
    (tmp_path / "w.pdparams").write_bytes(b"x")
    words = ["--scale", "full", "--data-path", str(tmp_path)]
    assert parse(words, prog="main.py").student.frozen == 14  # above paddle.vision's weights
    for flag in ("--init", "--pretrained"):
        settings = parse([*words, flag, str(tmp_path / "w.pdparams")], prog="main.py")
        assert settings.student.frozen == 14
    assert parse([*words, "--init", "none"], prog="main.py").student.frozen == 0


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """24 photographs, each with three augmented copies that carry its name."""
    root, rng = tmp_path_factory.mktemp("augmented set"), np.random.default_rng(0)
    for photo in range(24):
        folder = root / ("Harmful" if photo % 2 else "Kitchen")
        folder.mkdir(exist_ok=True)
        for copy in range(4):
            pixels = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
            cv2.imwrite(str(folder / f"photo{photo}_aug{copy}.png"), pixels)
    return root


def prepared(root, output, *words):
    """Parts by file, and the sides that the copies of each photograph lie on."""
    words = ["--data-path", str(root), "--input-size", "24", "--workers", "0", *words]
    data = prepare(parse([*words, "--output", str(output)], prog="main.py"), output)
    held = set() if data.test is None else {path.rsplit("/", 1)[-1] for path in data.test.paths}
    sides, folds = {}, dict(zip((e.path for e in data.entries), data.folds, strict=True))
    for path in root.rglob("*.png"):
        photo = path.name.split("_")[0]
        side = "test" if path.name in held else int(folds[f"{path.parent.name}/{path.name}"])
        sides.setdefault(photo, set()).add(side)
    return data, held, sides


def test_a_group_pattern_guards_the_held_out_part_and_the_folds(copies, tmp_path):
    _, held, sides = prepared(copies, tmp_path / "a", "--test-share", "0.25")
    assert held and sum(len(side) > 1 for side in sides.values()) > 12  # or the next proves nothing
    pattern = ("--group-pattern", r"^(photo\d+)_", "--test-share", "0.25")
    data, held, sides = prepared(copies, tmp_path / "b", *pattern)
    assert held and all(len(side) == 1 for side in sides.values())
    assert data.groups == sum("test" not in side for side in sides.values())
    with pytest.raises(DatasetError, match="matches no file's name"):
        prepared(copies, tmp_path / "c", "--group-pattern", "picture")


def test_a_manifest_decides_what_is_held_out(copies, tmp_path):
    first, held, _ = prepared(copies, tmp_path / "a", "--test-share", "0.3", "--split-seed", "7")
    file = tmp_path / "a" / "split.json"
    again, same, _ = prepared(copies, tmp_path / "b", "--split", str(file))
    assert same == held and again.prepared.manifest.hash == first.prepared.manifest.hash
    assert prepared(copies, tmp_path / "c")[1] != held
    written = json.loads((tmp_path / "b" / "split.json").read_text())
    assert written["samples"] == json.loads(file.read_text())["samples"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [(("--test-share", "0"), 0), (("--n-splits", "3"), 3), (("--kfold", "plain"), 5)],
)
def test_parts_are_as_many_as_were_asked_for(copies, tmp_path, words, parts):
    data, held, _ = prepared(copies, tmp_path / "a", *words)
    assert (data.test is None) == (not parts)
    assert set(data.folds.tolist()) == set(range(parts or 5))
    assert len(data.images) + len(held) == 96
