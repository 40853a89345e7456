"""TensorBoard's event files, read back; pictures; and that training works without TensorBoard."""

from __future__ import annotations

import io
import sys
import time

import numpy as np
import pytest

from shared_core.runs import read_metrics
from torch_cls_zoo.utils.pictures import captioned_sheet, confusion_picture
from torch_cls_zoo.utils.tensorboard_log import TensorBoardLog


@pytest.fixture(scope="module")
def events(zoo_trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(zoo_trained[0] / "logs"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_the_tags_of_the_original_are_there_with_the_log_s_numbers(events, zoo_trained):
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "Train/Loss", "Train/Accuracy", "Val/Loss", "Val/Accuracy", "learning rate",
    }  # fmt: skip
    lines = read_metrics(zoo_trained[0] / "metrics.jsonl")
    for tag, split, key in (
        ("Train/Loss", "train", "loss"),
        ("Train/Accuracy", "train", "accuracy"),
        ("Val/Loss", "val", "loss"),
        ("Val/Accuracy", "val", "accuracy"),
        ("learning rate", "train", "lr"),
    ):
        want = [line[key] for line in lines if line["split"] == split]
        got = events.Scalars(tag)
        assert [event.step for event in got] == list(range(6))
        np.testing.assert_allclose([event.value for event in got], want, rtol=1e-6)


def test_the_histogram_holds_every_batch_norm_scale(events, zoo_trained, zoo_best):
    from shared_core.for_torch.checkpoints import load_checkpoint

    (tag,) = events.Tags()["histograms"]
    assert tag == "BN gamma"
    last = events.Histograms(tag)[-1].histogram_value
    weights, _ = load_checkpoint(zoo_trained[0] / "checkpoints" / "checkpoint_test_resnet.pth")
    scales = np.concatenate([
        weights[name.replace("running_mean", "weight")].numpy()
        for name in weights if name.endswith("running_mean")
    ])  # fmt: skip
    assert last.num == len(scales)
    assert last.sum == pytest.approx(float(scales.sum()), rel=1e-5)
    assert last.min == pytest.approx(float(scales.min()), rel=1e-5)


def test_confusion_and_predictions_are_pictures(events, zoo_trained):
    from PIL import Image

    assert set(events.Tags()["images"]) == {"Val/Confusion", "Val/Predictions"}
    for tag in ("Val/Confusion", "Val/Predictions"):
        shown = events.Images(tag)[-1]
        pixels = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
        assert pixels.ndim == 3 and pixels.std() > 10


def test_steps_from_before_a_stop_are_taken_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardLog(tmp_path)
    for step in range(4):
        first.scalars({"x": step}, step)
    first.close()
    time.sleep(1.05)  # event files are read in the order of their names, which count seconds
    again = TensorBoardLog(tmp_path, first_step=2)
    again.scalars({"x": 20.0}, 2)
    again.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("x")] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_training_works_without_tensorboard(monkeypatch, tmp_path, capsys, zoo_words, zoo_command):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = zoo_command(*zoo_words(tmp_path / "run", "--epochs", 2))
    assert done.code == 0, done.err
    assert "tensorboard is not installed" in done.err
    assert not (tmp_path / "run" / "logs").exists()


def test_the_confusion_picture_is_dark_where_the_counts_are():
    picture = confusion_picture([[9, 1], [0, 10]], ["a", "b"]).astype(int)
    assert picture.ndim == 3
    blue = (picture[..., 2] - picture[..., 0]) > 40
    assert 0.05 < blue.mean() < 0.6
    with pytest.raises(ValueError, match="expected"):
        confusion_picture([[1, 2]], ["a", "b"])


def test_sheets_hold_every_picture_once():
    images = [np.full((10, 12, 3), 30 * n, np.uint8) for n in range(1, 8)]
    sheet = captioned_sheet(images, [["x", "y"]] * 7, columns=3, width=24)
    height, width = 20 + 2 + 2 * 16 + 4, 24 + 4
    assert sheet.shape == (3 * height, 3 * width, 3)
    for n in range(7):
        row, column = divmod(n, 3)
        middle = sheet[row * height + 12, column * width + 14]
        assert (middle == 30 * (n + 1)).all()
    with pytest.raises(ValueError, match="expected as many"):
        captioned_sheet(images, [["x"]])
