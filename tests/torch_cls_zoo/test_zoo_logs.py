"""TensorBoard's event files, read back; pictures; and that training works without TensorBoard."""

from __future__ import annotations

import io
import sys
import time

import numpy as np
import pytest
from matplotlib import rcParams

from shared_core.runs import read_metrics
from torch_cls_zoo.utils import fonts
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


@pytest.fixture
def clothes_font(tmp_path, monkeypatch):
    """Of all fonts only one with a single Chinese letter, a full square; its file."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder, square = FontBuilder(1000), pen.glyph()
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord("衣"): "square", ord("a"): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Clothes", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900)
    builder.setupPost()
    builder.save(tmp_path / "clothes.ttf")
    entry = font_manager.FontEntry(fname=str(tmp_path / "clothes.ttf"), name="Clothes")
    plain = [one for one in font_manager.fontManager.ttflist if one.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*plain, entry])
    fonts.font_for.cache_clear()
    yield tmp_path / "clothes.ttf"
    fonts.font_for.cache_clear()


def test_names_are_drawn_in_a_font_that_has_their_letters(clothes_font):
    found = fonts.font_for(fonts.letters_of(["衣", "a"]))
    assert found == ("Clothes", str(clothes_font)) and fonts.lacking_font(["衣"]) is None
    assert fonts.font_for(fonts.letters_of(["Hüte", "шляпа"])).name == "DejaVu Sans"
    image = np.full((20, 128, 3), 255, np.uint8)
    below = captioned_sheet([image], [["衣衣衣衣"]])[24:]
    assert (below < 128).all(axis=2).sum() > 4 * 80  # four black squares of 12 px
    with fonts.figure_texts(["衣"]) as ready:
        assert rcParams["font.family"][0] == "Clothes" and ready("衣") == "衣"


def test_names_without_a_font_are_escaped_and_that_is_said(clothes_font):
    assert "fonts-noto-cjk" in fonts.lacking_font(["帽子"])
    with fonts.figure_texts(["帽子"]) as ready:
        assert ready("帽子") == r"\u5e3d\u5b50" and ready("$5\n") == r"\$5\n"
    image = np.full((20, 128, 3), 255, np.uint8)
    sheets = [captioned_sheet([image], [[text]]) for text in ("帽子", r"\u5e3d\u5b50")]
    np.testing.assert_array_equal(*sheets)
