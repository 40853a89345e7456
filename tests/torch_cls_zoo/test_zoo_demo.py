"""The demo: the right class from jit and ONNX files, for files, folders, videos; clear errors."""

import sys

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from shared_core.runs import run_command
from torch_cls_zoo.dataloader.preprocess import preprocess
from torch_cls_zoo.demos import classifier
from torch_cls_zoo.demos.drawing import draw_result
from torch_cls_zoo.demos.exported import load_exported
from torch_cls_zoo.applications.export_files import demo_facts, export_all

CLASSES = ["red", "green", "blue"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Colours(nn.Module):
    """Logits are the mean colours of the picture itself, in units of 1/255."""

    def forward(self, x):
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (MEAN, STD))
        return ((x * std + mean) * 255).mean((2, 3)) / 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    facts = {}
    for family in ("softmax", "bce"):
        facts = demo_facts(
            arch="colours", class_names=CLASSES, image_size=(20, 31), mean=MEAN, std=STD,
            family=family,
        )  # fmt: skip
        export_all(
            Colours(), folder, arch=family, image_size=(20, 31), facts=facts,
            formats=("jit", "onnx") if family == "softmax" else ("jit",),
        )  # fmt: skip
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(CLASSES):
        image = np.random.default_rng(number).integers(0, 60, (40, 50, 3)).astype(np.uint8)
        image[..., number] += 180
        where = folder / ("deep" if number == 2 else "")
        cv2.imwrite(str(where / f"{name}.png"), image[..., ::-1])
    return folder


@pytest.mark.parametrize("file", ["jit_softmax.pt", "softmax.onnx"])
def test_classes_and_probabilities_are_right(models, pictures, file, capsys) -> None:
    assert run_command(classifier.main, [str(models / file), str(pictures), "--topk", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for name in CLASSES:
        (line,) = [one for one in lines if f"{name}.png" in one]
        image = cv2.imread(str(next(pictures.rglob(f"{name}.png"))))[..., ::-1]
        logits = preprocess(image, (20, 31)).astype(np.float64).mean((0, 1)) / 20
        share = np.exp(logits - logits.max())
        share /= share.sum()
        assert f": {name} {share.max():.3f}"[:-1] in line and line.count(",") == 1


def test_sigmoid_models_do_not_share_their_probabilities(models, pictures) -> None:
    image = cv2.imread(str(pictures / "red.png"))[..., ::-1]
    logits = preprocess(image, (20, 31)).astype(np.float64).mean((0, 1)) / 20
    found = load_exported(models / "jit_bce.pt").probabilities([image, image])
    np.testing.assert_allclose(found, np.tile(1 / (1 + np.exp(-logits)), (2, 1)), rtol=1e-4)


def test_labelled_pictures_are_written(models, pictures, tmp_path) -> None:
    words = [str(models / "softmax.onnx"), str(pictures), "--output", str(tmp_path / "out")]
    assert run_command(classifier.main, words) == 0
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert found == ["deep/blue.png", "green.png", "red.png"]
    drawn = cv2.imread(str(tmp_path / "out" / "red.png"))
    assert drawn.shape == (200, 250, 3)  # enlarged fivefold, so that the text can be read


def test_a_video_is_labelled(models, tmp_path, capsys) -> None:
    path = tmp_path / "in.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (320, 240))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MPEG-4")
    for number in range(6):
        frame = np.full((240, 320, 3), 30, np.uint8)
        frame[..., 2 if number < 3 else 0] = 220  # BGR: red, then blue
        writer.write(frame)
    writer.release()
    words = [str(models / "jit_softmax.pt"), "--video", str(path), "--output", str(tmp_path / "o")]
    assert run_command(classifier.main, [*words, "--every", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:3]] == ["red", "red", "blue"]
    assert lines[3].startswith("6 frames, 3 classified")
    capture = cv2.VideoCapture(str(tmp_path / "o" / "labelled.mp4"))
    assert capture.isOpened() and int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 6


def test_pictures_that_cannot_be_read_do_not_stop_the_rest(models, pictures, capsys) -> None:
    (pictures / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert run_command(classifier.main, [str(models / "jit_softmax.pt"), str(pictures)]) == 1
    done = capsys.readouterr()
    assert len(done.out.splitlines()) == 3 and "bad.jpg" in done.err


def test_errors_are_one_line(models, pictures, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    jit, empty = str(models / "jit_softmax.pt"), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "other.pt").write_bytes(b"nothing")
    (tmp_path / "other.onnx").write_bytes(b"nothing")
    plain = torch.jit.trace(nn.Flatten(), torch.zeros(1, 2))
    torch.jit.save(plain, str(tmp_path / "plain.pt"))
    cases = [
        ([jit], 2, "0 sources"),
        ([jit, str(pictures), "--webcam", "0"], 2, "2 sources"),
        ([jit, str(pictures), "--topk", "0"], 2, "--topk 0"),
        ([jit, str(pictures), "--every", "2"], 2, "for --video"),
        ([jit, str(empty)], 1, "no picture in this folder"),
        ([jit, "nowhere.png"], 1, "no such file"),
        ([jit, "--video", str(tmp_path / "none.mp4")], 1, "no such file"),
        ([jit, "--video", str(pictures / "red.png"), "--frames", "-1"], 2, "--frames -1"),
        ([jit, "--webcam", "93"], 1, "--webcam 93: cannot be opened"),
        ([str(tmp_path / "none.pt"), str(pictures)], 1, "no such model file"),
        ([str(tmp_path / "other.pt"), str(pictures)], 1, "no TorchScript file"),
        ([str(tmp_path / "other.onnx"), str(pictures)], 1, "no ONNX file"),
        ([str(tmp_path / "plain.pt"), str(pictures)], 1, "does not say its class_names"),
    ]
    if sys.platform == "linux":
        cases.append(([jit, str(pictures), "--show"], 2, "no screen here"))
    for words, code, message in cases:
        assert run_command(classifier.main, words) == code, words
        error = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error:")]
        assert len(error) == 1 and message in error[0], (words, error)


@pytest.mark.parametrize("shape", [(7, 5, 3), (300, 40, 3), (64, 2000, 3)])
def test_drawing_fits_any_size_and_leaves_the_picture_alone(shape) -> None:
    image = np.full(shape, 200, np.uint8)
    drawn = draw_result(image, [("猫", 1.0), ("dog", 0.2), ("x" * 80, 0.0)])
    assert (image == 200).all() and drawn.dtype == np.uint8
    assert drawn.shape[0] % shape[0] == 0 and drawn.shape[1] >= 240 and (drawn != 200).any()
