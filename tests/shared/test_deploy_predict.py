"""Predictions of files, folders, lines, videos: right answers in order, nothing lost, all named."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_models as tiny

from shared_core import smallvision
from shared_core.deploy import inputs, show
from shared_core.deploy import predict as predict_module
from shared_core.deploy.answers import UNKNOWN
from shared_core.deploy.options import PredictOptions
from shared_core.deploy.predictor import open_model
from shared_core.runs import run_command
from shared_core.texts import printable

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def images():
    return tiny.make_images(9)


@pytest.fixture(scope="module")
def truth(images):
    return tiny.probabilities_by_hand(images)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "a model")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return tiny.save_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    root = tmp_path_factory.mktemp("some images")  # a blank in the path
    for index, one in enumerate(images):
        place = root / ("deep/er" if index > 5 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(tiny.encode(one))
    (root / ".hidden.png").write_bytes(b"x")
    return root


@pytest.fixture
def run(capsys):
    """The command in this process: exit code, output, errors."""

    def call(*words):
        code = run_command(smallvision.main, ["predict", *map(str, words)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


NAMES = [*(f"{i}.png" for i in range(6)), *(f"deep/er/{i}.png" for i in (6, 7, 8))]


def test_answers_differ_from_picture_to_picture(truth):
    """Or the tests below would not see a mix-up."""
    assert len(set(truth.argmax(axis=1))) >= 3
    gaps = np.abs(truth[:, None] - truth[None]).max(axis=2)[~np.eye(len(truth), dtype=bool)]
    assert gaps.min() > 3e-3


def test_one_file_prints_one_line(run, model, folder, truth):
    code, out, err = run(model, folder / "2.png", "--top", "2")
    order = np.argsort(-truth[2])[:2]
    named = ", ".join(f"{tiny.CLASSES[k]} {truth[2][k]:.4f}" for k in order)
    assert (code, out, err) == (0, f"{folder / '2.png'}: {named}\n", "")


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_in_order_as_json_and_csv(run, model, folder, truth, tmp_path, batch, workers):
    code, out, err = run(
        model, folder, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv", "--batch-size",
        batch, "--workers", workers, "--every-class",
    )  # fmt: skip
    assert code == 0, err
    assert "9 images; " in out.splitlines()[-1] and len(out.splitlines()) == 10
    said = json.loads((tmp_path / "o.json").read_text())
    assert [row["path"] for row in said["images"]] == [str(folder / name) for name in NAMES]
    got = np.array([row["probabilities"] for row in said["images"]])
    np.testing.assert_allclose(got, truth, atol=1e-5)
    for row, p in zip(said["images"], truth, strict=True):
        order = np.argsort(-p)
        assert [one["class"] for one in row["top"]] == [tiny.CLASSES[k] for k in order[:3]]
        assert row["class"] == tiny.CLASSES[order[0]] and row["macs"] == 1000
    assert said["class_names"] == list(tiny.CLASSES) and said["bad"] == []
    assert said["model"] == str(model) and said["runtime"] == "onnx" and said["policy"] is None
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(folder / name) for name in NAMES]
    from_csv = [[float(row[f"p({name})"]) for name in tiny.CLASSES] for row in rows]
    np.testing.assert_allclose(from_csv, got)
    assert [float(row["probability_2"]) for row in rows] == [
        row["top"][1]["probability"] for row in said["images"]
    ]


def test_batches_are_as_large_as_asked(model, folder, monkeypatch):
    predictor = open_model(model)
    sizes = []
    real = predictor.outputs
    predictor.outputs = lambda images: (sizes.append(len(images)), real(images))[1]
    predict_module.predict(predictor, PredictOptions((str(folder),), batch_size=4))
    assert sizes == [1, 4, 4, 1]  # the first warms up


def test_progress_with_the_remaining_time_where_the_answers_go_elsewhere(
    model, folder, monkeypatch
):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    predictor, paths = open_model(model), (str(folder),)
    real = predictor.outputs
    predictor.outputs = lambda images: (time.sleep(0.1), real(images))[1]
    predict_module.predict(predictor, PredictOptions(paths, batch_size=2))
    assert re.search(r"predict: [2-6]/6, 0:\d\d left", screen.getvalue())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    before = screen.getvalue()
    predict_module.predict(predictor, PredictOptions(paths, batch_size=2))
    assert screen.getvalue() == before  # lines and a moving line would be mixed


def test_json_lines_are_printed_and_written(run, model, folder, tmp_path, truth):
    code, out, _ = run(model, folder, "--format", "jsonl", "--json", tmp_path / "o.jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == [str(folder / name) for name in NAMES]
    assert [row["class"] for row in rows] == [tiny.CLASSES[k] for k in truth.argmax(axis=1)]
    assert "probabilities" not in rows[0]
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()] == rows


def test_exits_are_told_in_every_form(run, chain, folder, images, tmp_path):
    left, truth = tiny.exits_by_hand(images)
    code, out, _ = run(chain, folder, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
    names = [("block 2", "block 5", "final")[n] for n in left]
    assert code == 0 and [line.split("  exit ")[1] for line in out.splitlines()[:-1]] == names
    said = json.loads((tmp_path / "o.json").read_text())
    assert [row["exit_index"] for row in said["images"]] == left.tolist()
    assert [row["macs"] for row in said["images"]] == [tiny.MACS[n] for n in left]
    mean = np.mean([tiny.MACS[n] for n in left])
    assert said["summary"]["mean_macs"] == pytest.approx(mean)
    assert said["summary"]["macs_fraction"] == pytest.approx(mean / 700)
    assert f"{100 * mean / 700:.1f} % of a full run" in out
    assert said["policy"]["thresholds"] == [0.6]
    with (tmp_path / "o.csv").open(newline="") as file:
        assert [row["exit"] for row in csv.DictReader(file)] == names
    _, out, _ = run(chain, folder, "--policy", "max_prob", "--threshold", "2")
    assert out.count("exit final") == 9
    _, out, _ = run(chain, folder, "--policy-point", "fast")
    assert out.count("exit block 2") == (tiny.exits_by_hand(images, 0.3)[0] == 0).sum() > 5


def test_bad_files_are_named_the_rest_is_classified_and_the_exit_code_says_so(
    run, model, folder, tmp_path
):
    root = tmp_path / "set"
    root.mkdir()
    shutil.copy(folder / "0.png", root / "b.png")
    (root / "a.png").write_bytes(b"")
    (root / "c.jpg").write_bytes((folder / "1.png").read_bytes()[:60])
    (root / "notes.txt").write_text("no image")
    code, out, err = run(model, root, root / "none.png", "--json", tmp_path / "o.json")
    assert code == 1 and "1 images, 3 that could not be read" in out and "b.png: " in out
    lines = err.splitlines()
    assert len(lines) == 4 and "left out: 1 .txt" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["unreadable"] * 3
    assert [Path(line.split(": ")[1]).name for line in lines[1:]] == ["none.png", "a.png", "c.jpg"]
    assert lines[2].count("a.png") == 1  # said once
    said = json.loads((tmp_path / "o.json").read_text())
    assert [Path(one["path"]).name for one in said["bad"]] == ["none.png", "a.png", "c.jpg"]
    assert said["summary"]["unreadable"] == 3
    code, out, _ = run(model, root, "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert ["error" in row for row in rows] == [True, False, True]  # in their places


def test_many_bad_files_at_the_end_are_all_named(run, model, folder, tmp_path):
    for n in range(7):
        (tmp_path / f"x{n}.png").write_bytes(b"")
    code, out, err = run(model, folder / "0.png", tmp_path, "--batch-size", "2", "--workers", "2")
    assert code == 1 and err.count("unreadable") == 7 and out.count(": ") == 1
    assert run(model, tmp_path)[0] == 1  # nothing but bad ones


def test_an_empty_folder_is_no_success(run, model, tmp_path):
    code, _, err = run(model, tmp_path)
    assert code == 1 and "no image in this folder" in err


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_names_that_are_no_utf8_or_hold_separators_lose_nothing(run, model, images, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    names = [b"\xb2\xe2\xca\xd4.png", b'a,"b;\tc.png', b"line\nbreak.png", "图片.png".encode()]
    for name in names:
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(tiny.encode(images[0]))
    code, out, err = run(model, root, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
    assert code == 0 and err == "" and len(out.splitlines()) == 5
    assert "line\\nbreak.png" in out and "\\xb2" in out and "图片" in out
    said = json.loads((tmp_path / "o.json").read_bytes().decode("utf-8"))
    assert {os.fsencode(row["path"]) for row in said["images"]} == {
        os.fsencode(root) + b"/" + name for name in names
    }
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8") as file:
        paths = {Path(row["path"]).name for row in csv.DictReader(file)}
    assert {'a,"b;\tc.png', "line\nbreak.png", "图片.png"} < paths


def test_a_screen_without_unicode_gets_escapes(model, folder, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    facts = tiny.make_facts(class_names=("蓝", "绿", "红", "灰"))
    predictor = open_model(tiny.save_model(folder.parent / "other model", facts))
    for form in ("text", "jsonl"):
        predict_module.predict(predictor, PredictOptions((str(folder / "0.png"),), format=form))
    text, line = raw.getvalue().decode("ascii").splitlines()
    assert "\\u7eff" in text and json.loads(line)["class"] == "绿"


def test_files_are_written_whole_or_not_at_all(run, model, folder, tmp_path, monkeypatch):
    target = tmp_path / "o.csv"
    target.write_text("before")

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(predict_module, "answer_batch", fails)
    run(model, folder, "--csv", target, "--json", tmp_path / "o.json")
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["o.csv"]


def test_below_the_threshold_the_answer_is_unknown(run, folder, truth, tmp_path):
    limit = float(np.median(truth.max(axis=1)))
    model = tiny.save_model(tmp_path / "m", tiny.make_facts(unknown_threshold=limit))
    code, out, _ = run(model, folder, "--json", tmp_path / "o.json")
    said = json.loads((tmp_path / "o.json").read_text())
    wanted = [UNKNOWN if p.max() < limit - 1e-6 else tiny.CLASSES[p.argmax()] for p in truth]
    got = [row["class"] for row in said["images"]]
    near = np.abs(truth.max(axis=1) - limit) < 1e-5
    assert [g for g, n in zip(got, near, strict=True) if not n] == [
        w for w, n in zip(wanted, near, strict=True) if not n
    ]
    assert 3 <= got.count(UNKNOWN) <= 5 and out.count(f": {UNKNOWN} (") == got.count(UNKNOWN)
    assert [row["top"][0]["class"] for row in said["images"]] == [
        tiny.CLASSES[p.argmax()] for p in truth
    ]


def test_an_embedder_gives_features(run, images, folder, tmp_path):
    facts = tiny.make_facts(task="embed", activation="none", class_names=())
    model = tiny.save_model(tmp_path / "m", facts)
    code, out, _ = run(model, folder, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
    assert code == 0 and "a feature of 4 numbers" in out
    said = json.loads((tmp_path / "o.json").read_text())
    wanted = tiny.logits_by_hand(images)
    np.testing.assert_allclose([row["feature"] for row in said["images"]], wanted, atol=1e-5)
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["f3"]) for row in rows], wanted[:, 3], atol=1e-5)


# -- lines ----------------------------------------------------------------------------------------


def test_paths_from_lines_are_answered_in_order(model, folder, truth, capsys):
    lines = [f"{folder / name}\n" for name in NAMES[:3]] + ["\n", "none.png\r\n"]
    lines += [os.fsencode(folder / NAMES[4]) + b"\n"]
    code = predict_module.predict(
        open_model(model), PredictOptions(("-",), format="jsonl", batch_size=2), lines=lines
    )
    done = capsys.readouterr()
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert code == 1 and "none.png: no such file" in done.err
    found = [row for row in rows if "class" in row]
    assert [Path(row["path"]).name for row in found] == ["0.png", "1.png", "2.png", "4.png"]
    assert [row["class"] for row in found] == [
        tiny.CLASSES[k] for k in truth[[0, 1, 2, 4]].argmax(axis=1)
    ]


def test_a_program_that_waits_for_each_answer_gets_it(model, folder):
    """One path in, one answer out, whatever the batch size."""
    words = [sys.executable, "-m", "shared_core.smallvision", "predict", model, "-", "--format",
             "jsonl"]  # fmt: skip
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env={**os.environ, "PYTHONPATH": str(Path(smallvision.__file__).parents[1])},
    )  # fmt: skip
    guard = threading.Timer(20, process.kill)
    guard.start()
    try:
        for name in NAMES[:3]:
            process.stdin.write(f"{folder / name}\n")
            assert json.loads(process.stdout.readline())["path"] == str(folder / name)
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        guard.cancel()
        process.kill()
        process.stdout.close()


# -- videos ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video(tmp_path_factory, images):
    """Seven frames of one colour each, 10 a second."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write a video")
    for one in images[:7]:
        colour = one.reshape(-1, 3).mean(axis=0)[::-1].round().astype(np.uint8)
        writer.write(np.full((48, 64, 3), colour, np.uint8))
    writer.release()
    return path


def test_frames_of_a_video(run, model, video, truth, tmp_path):
    code, out, _ = run(model, video, "--every", "2", "--json", tmp_path / "o.json")
    said = json.loads((tmp_path / "o.json").read_text())["images"]
    assert code == 0 and [row["frame"] for row in said] == [0, 2, 4, 6]
    assert f"{video} frame 2: " in out
    got = {row["frame"]: row["class"] for row in said}
    clear = [n for n in (0, 2, 4, 6) if np.sort(truth[n])[-1] - np.sort(truth[n])[-2] > 0.3]
    assert len(clear) >= 3 and len({got[n] for n in clear}) >= 2
    assert all(got[n] == tiny.CLASSES[truth[n].argmax()] for n in clear)
    _, out, _ = run(model, "--video", video, "--frames", "3")
    assert out.count(" frame ") == 3
    code, _, err = run(model, "--video", video.with_name("none.avi"))
    assert code == 1 and "does not exist, expected a video" in err
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    code, _, err = run(model, broken)
    assert code == 1 and "cannot be opened" in err and err.count("\n") == 1


def test_a_camera_is_read_until_ctrl_c(model, monkeypatch, images, capsys, tmp_path):
    class Camera:
        def __init__(self, source):
            assert source == 3
            self.left = 4

        def isOpened(self):  # noqa: N802
            return True

        def get(self, what):
            return 0.0

        def read(self):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return True, np.ascontiguousarray(images[self.left][..., ::-1])

        def release(self):
            pass

    monkeypatch.setattr(inputs.cv2, "VideoCapture", Camera)
    options = PredictOptions(camera=3, json=tmp_path / "o.json")
    assert predict_module.predict(open_model(model), options) == 0
    assert capsys.readouterr().out.count("camera 3 frame ") == 3
    assert len(json.loads((tmp_path / "o.json").read_text())["images"]) == 3


def test_a_labelled_video_has_every_frame(run, model, video, tmp_path):
    run(model, video, "--every", "3", "--show-dir", tmp_path)
    with inputs.opened_video(tmp_path / "labelled.mp4") as capture:
        assert round(capture.get(cv2.CAP_PROP_FPS)) == 10
        frames = 0
        while capture.read()[0]:
            frames += 1
    assert frames == 7


# -- shown ----------------------------------------------------------------------------------------


def test_show_writes_an_annotated_picture_without_a_display(
    run, model, folder, images, truth, tmp_path, monkeypatch
):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(model, folder / "3.png", "--show")
    assert code == 0 and "wrote 1 pictures to inference_results" in err
    picture = cv2.imread(str(tmp_path / "inference_results" / "3.png.png"))[..., ::-1]
    assert picture.shape == (480 + 3 * 30 + 10, 480, 3)
    assert np.array_equal(picture[6, 6], images[3][0, 0])  # the image, then the panel
    bar = (picture[480:] == (46, 125, 79)).all(axis=2).any(axis=0).sum()
    assert abs(bar - truth[3].max() * 460) <= 2  # the first bar is as long as the probability


def test_show_opens_a_window_where_there_is_a_display(run, model, folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setenv("DISPLAY", ":9")
    monkeypatch.setattr(show.cv2, "imshow", lambda name, image: shown.append(image))
    monkeypatch.setattr(show.cv2, "waitKey", lambda ms: ord("q") if len(shown) == 2 else 0)
    monkeypatch.chdir(tmp_path)
    code, _, _ = run(model, folder, "--show")
    assert code == 0 and len(shown) == 2 and not list(tmp_path.iterdir())  # q ends it

    def fails(*_):
        raise cv2.error("no window")

    monkeypatch.setattr(show.cv2, "imshow", fails)
    code, _, _ = run(model, folder / "0.png", "--show")
    assert code == 0 and (tmp_path / "inference_results" / "0.png.png").is_file()


def test_pictures_of_equal_names_do_not_overwrite_each_other(run, model, folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "1.png", tmp_path / name / "x.png")
    run(model, tmp_path / "a", tmp_path / "b", "--show-dir", tmp_path / "shown")
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == ["x.png-2.png", "x.png.png"]


def test_a_class_name_of_another_script_is_drawn():
    image = np.zeros((10, 10, 3), np.uint8)
    drawn = [show.annotate(image, [(name, 0.9), ("Other", 0.1)]) for name in ("厨余垃圾", "")]
    assert (drawn[0] != drawn[1]).any()


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to classify"),
        (["-", "-"], "read once"),
        (["x", "--json", "/no/such/folder/x.json"], "folder that exists"),
        (["x", "--batch-size", "0"], "expected"),
        (["x", "--top", "-1"], "expected"),
        (["x", "--threshold", "0.5"], "expected --policy KIND"),
        (["x", "--policy", "margin", "--threshold", "a,b"], "expected a number"),
        (["x", "--policy", "margin", "--no-exits"], "not allowed with"),
        (["x", "--policy-point", "fast"], "has no exits"),
        (["x", "--runtime", "abacus"], "invalid choice"),
        (["x", "--show-dir", __file__], "is a file"),
    ],
)
def test_words_that_do_not_fit_are_refused(run, model, words, said, capsys):
    try:
        code, _, err = run(model, *words)
    except SystemExit as stop:
        code, err = stop.code, capsys.readouterr().err
    assert code == 2 and said in err


def test_printable_keeps_what_people_read():
    assert printable("ä 图\u3000x") == "ä 图\u3000x"
    assert printable("a\nb\x1b[31m\udcff\u2028") == "a\\nb\\x1b[31m\\xff\\u2028"
