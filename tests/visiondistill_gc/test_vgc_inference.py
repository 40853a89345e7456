"""inference.py says what evaluation says, of a file or a folder, and nothing it was not asked."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest

from shared_core import datasets
from shared_core.for_paddle.data import Normalizer
from visiondistill_gc import deploy_images, deploy_model, inference, inference_show
from visiondistill_gc.utils.model_files import load_model

from visiondistill_gc.utils.transforms import eval_view

_spec = importlib.util.spec_from_file_location(
    "vgc_tools", Path(__file__).with_name("vgc_tools.py")
)
tools = importlib.util.module_from_spec(_spec)
sys.modules["vgc_tools"] = tools  # its dataclasses look themselves up
_spec.loader.exec_module(tools)

CLASSES = tools.CLASSES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tools.save(tmp_path_factory.mktemp("a model") / "best_model_fold0.pdparams")


@pytest.fixture(scope="module")
def pixels():
    return tools.make_pixels()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pixels):
    root = tmp_path_factory.mktemp("some images")  # a blank in the path
    for index, one in enumerate(pixels):
        place = root / ("deep/er" if index > 5 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(tools.encode(one))
    (root / ".hidden.png").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def truth(pixels):
    return tools.true_probabilities(pixels)


def run(model, path, *words):
    return tools.call(inference, "--model_path", model, "--image_path", path, *words)


def test_one_file_prints_the_readme_s_line(model, folder, truth):
    done = run(model, folder / "2.png")
    best = int(truth[2].argmax())
    assert done.code == 0 and done.err == ""
    start = f"[{folder / '2.png'}] --> Predicted: {CLASSES[best]}, Confidence: {truth[2].max():.4f}"
    assert done.out.startswith(start)
    assert done.out.count("\n") == 1


def test_answers_differ_from_picture_to_picture(truth):
    """Or the tests below would not see a mix-up."""
    assert len(set(truth.argmax(axis=1))) >= 3
    gaps = np.abs(truth[:, None] - truth[None]).max(axis=2)[~np.eye(len(truth), dtype=bool)]
    assert gaps.min() > 3e-3


def test_a_folder_gives_the_probabilities_of_a_plain_pass_in_order(model, folder, truth, tmp_path):
    done = run(
        model, folder, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv",
        "--batch_size", "4", "--top_k", "2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"Processed 9 images in directory: {folder}"
    said = json.loads((tmp_path / "o.json").read_text())
    wanted = [*(f"{i}.png" for i in range(6)), *(f"deep/er/{i}.png" for i in (6, 7, 8))]
    assert [row["path"] for row in said["images"]] == [str(folder / name) for name in wanted]
    got = np.array([row["probabilities"] for row in said["images"]])
    np.testing.assert_allclose(got, truth, atol=3e-4)  # a steep little network
    for row, p in zip(said["images"], truth, strict=True):
        order = np.argsort(-p)
        assert [one["class"] for one in row["top"]] == [CLASSES[k] for k in order[:2]]
        assert row["class"] == CLASSES[order[0]]
    assert said["class_names"] == list(CLASSES) and said["bad"] == []
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "class", "probability", *(f"p({name})" for name in CLASSES)]
    np.testing.assert_allclose(np.array([r[3:] for r in rows[1:]], float), got)


def test_logits_are_those_of_evaluation_bit_by_bit(model, folder):
    """Same files through the loader, view and normaliser that training evaluates with."""
    paths = deploy_images.list_images(folder).files
    loaded = load_model(model)
    images = datasets.ImageSet(paths, [0] * len(paths))
    loader = datasets.BatchLoader(images, view=eval_view(loaded.input_size), batch_size=16)
    found = predict_logits(loaded.net, loader, normalizer=Normalizer(loaded.mean, loaded.std))
    classifier = deploy_model.load_classifier(model)
    views = np.concatenate([batch.images.copy() for batch in loader])
    assert np.array_equal(classifier.logits(views), found.logits)
    rows, _ = inference.predict(classifier, paths)
    got = np.array([row["probabilities"] for row in rows])
    np.testing.assert_allclose(got, softmax(found.logits), rtol=1e-13)


@pytest.mark.parametrize("kind", [".jpg", ".bmp", ".tiff", ".webp"])
def test_formats(model, pixels, tmp_path, kind):
    (tmp_path / f"a{kind}").write_bytes(tools.encode(pixels[0], kind))
    assert run(model, tmp_path / f"a{kind}").code == 0


def test_bad_files_are_named_the_rest_is_classified_and_the_exit_code_says_so(
    model, folder, tmp_path
):
    shutil.copy(folder / "0.png", tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes((folder / "1.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no image")
    done = run(model, tmp_path, "--json", tmp_path / "o.json")
    assert done.code == 1
    assert "Processed 1 images" in done.out and "b.png" in done.out
    lines = done.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["skipped", "unreadable", "unreadable"]
    assert "notes.txt" in lines[0] and "a.png" in lines[1] and "c.jpg" in lines[2]
    bad = json.loads((tmp_path / "o.json").read_text())["bad"]
    assert [Path(one["path"]).name for one in bad] == ["a.png", "c.jpg"]


def test_a_file_that_is_not_named_like_an_image_is_taken_when_it_is_named_itself(
    model, folder, tmp_path
):
    shutil.copy(folder / "0.png", tmp_path / "picture")
    assert run(model, tmp_path / "picture").code == 0
    done = run(model, tmp_path)
    assert done.code == 1 and "holds no image" in done.err


def test_categories_come_with_the_model_and_a_contradiction_is_an_error(model, folder):
    image = folder / "0.png"
    assert run(model, image, "--categories", *CLASSES).code == 0
    for words in (CLASSES[:3], (*CLASSES, "Fifth"), CLASSES[::-1], ("a", "b", "c", "d")):
        done = run(model, image, "--categories", *words)
        assert done.code == 1 and done.out == ""
        assert done.err.startswith("error: categories are ") and done.err.count("\n") == 1
        assert " ".join(CLASSES) in done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--use_gpu"], 2, "use_gpu"),
        (["--runtime", "onnx"], 2, "expected a folder"),
        (["--show_dir", "x"], 2, "expected --show too"),
        (["--json", "/no/such/folder/x.json"], 2, "folder that exists"),
        (["--batch_size", "0"], 2, "whole number from 1"),
        (["--top_k", "-1"], 2, "whole number from 1"),
    ],
)
def test_flags_work_or_are_refused(model, folder, words, code, said):
    if words == ["--use_gpu"] and paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle has CUDA")
    done = run(model, folder / "0.png", *words)
    assert done.code == code and said in done.err


def test_missing_things(model, folder, tmp_path):
    done = run(tmp_path / "none.pdparams", folder)
    assert done.code == 1 and "none.pdparams" in done.err and done.err.count("\n") == 1
    done = run(model, tmp_path / "none.png")
    assert done.code == 1 and "none.png" in done.err
    (tmp_path / "m.pdparams").write_bytes(b"garbage")
    done = run(tmp_path / "m.pdparams", folder)
    assert done.code == 1 and done.err.startswith("error: ")
    done = run(tmp_path, folder)
    assert done.code == 1 and "model.json" in done.err


def test_show_writes_an_annotated_picture_without_a_display(model, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    done = run(model, folder / "3.png", "--show")
    assert done.code == 0 and "wrote 1 pictures to inference_results" in done.out
    picture = cv2.imread(str(tmp_path / "inference_results" / "3.png.png"))[..., ::-1]
    source = cv2.imread(str(folder / "3.png"))[..., ::-1]
    assert picture.shape == (480 + 3 * 30 + 10, 480, 3)
    assert np.array_equal(picture[6, 6], source[0, 0])  # the image, then the panel
    bar = (picture[480:] == (46, 125, 79)).all(axis=2).any(axis=0).sum()
    p = tools.true_probabilities(tools.make_pixels())[3].max()
    assert abs(bar - p * 460) <= 2  # the first bar is as long as the probability


def test_show_opens_a_window_where_there_is_a_display(model, folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setenv("DISPLAY", ":9")
    monkeypatch.setattr(inference_show.cv2, "imshow", lambda name, image: shown.append(image))
    monkeypatch.setattr(inference_show.cv2, "waitKey", lambda ms: 0)
    monkeypatch.chdir(tmp_path)
    assert run(model, folder / "0.png", "--show").code == 0
    assert len(shown) == 1 and not list(tmp_path.iterdir())

    def fails(*_):
        raise cv2.error("no window")

    monkeypatch.setattr(inference_show.cv2, "imshow", fails)
    done = run(model, folder / "0.png", "--show")
    assert done.code == 0 and (tmp_path / "inference_results" / "0.png.png").is_file()


def test_pictures_of_equal_names_do_not_overwrite_each_other(model, folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / f"{len(name)}.png", tmp_path / name / "x.png")
    done = run(model, tmp_path, "--show", "--show_dir", tmp_path / "shown")
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == ["x.png-2.png", "x.png.png"]


def test_a_class_name_of_another_script_is_drawn(tmp_path):
    top = [{"class": "厨余垃圾", "probability": 0.9}, {"class": "Other", "probability": 0.1}]
    blank = [{"class": "", "probability": 0.9}, {"class": "Other", "probability": 0.1}]
    image = np.zeros((10, 10, 3), np.uint8)
    assert (inference_show.annotate(image, top) != inference_show.annotate(image, blank)).any()


@pytest.mark.slow
def test_the_script_from_another_folder(model, folder, tmp_path):
    words = ["--model_path", model, "--image_path", folder / "0.png"]
    done = subprocess.run(
        [sys.executable, tools.PACKAGE / "inference.py", *words],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "--> Predicted: " in done.stdout, done.stderr
    assert done.stderr == ""
