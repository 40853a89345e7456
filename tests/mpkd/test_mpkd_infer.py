"""Inference: one = folder = stdin = HTTP, torch = ONNX Runtime = OpenVINO, and what is refused."""

from __future__ import annotations

import csv
import http.client
import io
import json
import threading

import cv2
import numpy as np
import pytest
import torch

from mpkd.dataset.sources import load_data
from mpkd.inference import infer
from mpkd.inference.backends import load_classifier
from mpkd.inference.server import Server, parse_address
from mpkd.utils.config import load_config
from shared_core.runs import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory, finished):
    """The run's own test images as files, and a file that is no image."""
    folder, _ = finished
    keys = {"dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160}
    data = load_data(
        load_config(None, (), overrides=keys), tmp_path_factory.mktemp("data"), data_root=None
    )
    root = tmp_path_factory.mktemp("images") / "with space"
    root.mkdir()
    for n in range(5):
        pixels = data.sets["test"].array[n][:, :, ::-1]
        (root / f"{n}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    (root / "odd.jpg").write_bytes(b"no image")
    return root


def test_single_folder_stdin_and_csv_say_the_same(tmp_path, finished, images, command):
    model = finished[0] / "checkpoints" / "student.pth"
    out = tmp_path / "rows.csv"
    done = command(model, "--dir", images, "--csv", out, "--batch", 2, entry=infer.main)
    assert done.code == 1 and "odd.jpg" in done.err  # one could not be read, five are answered
    with out.open(newline="") as stream:
        rows = {row["path"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 6 and rows[str(images / "odd.jpg")]["error"]
    done = command(model, "--dir", images, "--json", tmp_path / "r.json", entry=infer.main)
    many = {row["path"]: row for row in json.loads((tmp_path / "r.json").read_text())}
    classifier = load_classifier(model)
    lines = io.StringIO("".join(f"{images}/{n}.png\n" for n in range(5)))
    said = io.StringIO()
    assert infer.answer_lines(classifier, lines, said, top=3) == 0
    for line in said.getvalue().splitlines():
        one = json.loads(line)
        assert one["class"] == rows[one["path"]]["class"] == many[one["path"]]["class"]
        assert one["probability"] == pytest.approx(float(rows[one["path"]]["probability"]))
        assert one["top"][0]["probability"] >= one["top"][1]["probability"]
    done = command(model, "--image", images / "0.png", "--top", 1, entry=infer.main)
    assert done.code == 0 and many[str(images / "0.png")]["class"] in done.out


def test_backends_agree(finished, images):
    folder, _ = finished
    torch_one = load_classifier(folder / "checkpoints" / "student.pth")
    onnx_one = load_classifier(folder / "export")
    assert (torch_one.backend, onnx_one.backend) == ("torch", "onnxruntime")
    batch = [torch_one.open(str(images / f"{n}.png")) for n in range(5)]
    wanted = torch_one.probabilities(batch)
    assert np.allclose(wanted.sum(axis=1), 1)
    assert np.allclose(onnx_one.probabilities(batch), wanted, atol=1e-5)
    int8 = load_classifier(folder / "export" / "student_int8.onnx")
    assert np.abs(int8.probabilities(batch) - wanted).max() < 0.1
    assert onnx_one.classes == torch_one.classes and onnx_one.image_size == 8


def test_openvino_agrees(tmp_path, finished, images):
    openvino = pytest.importorskip("openvino")
    folder = tmp_path / "export"
    folder.mkdir()
    source = finished[0] / "export"
    (folder / "student.json").write_bytes((source / "student.json").read_bytes())
    model = openvino.convert_model(str(source / "student.onnx"))
    openvino.save_model(model, str(folder / "student_openvino.xml"), compress_to_fp16=False)
    found = load_classifier(folder, backend="openvino")
    wanted = load_classifier(source)
    batch = [found.open(str(images / f"{n}.png")) for n in range(5)]
    assert np.allclose(found.probabilities(batch), wanted.probabilities(batch), atol=1e-5)


@pytest.fixture(scope="module")
def server(finished):
    classifier = load_classifier(finished[0] / "checkpoints" / "student.pth")
    with Server(("127.0.0.1", 0), classifier, top=2, max_bytes=20_000) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path, body=body, headers=headers or {})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_http_gives_the_same_answer(server, images):
    data = (images / "1.png").read_bytes()
    status, found = ask(server, "POST", "/predict", data)
    classifier = server.classifier
    row = classifier.probabilities([classifier.open(str(images / "1.png"))])[0]
    assert status == 200 and found == classifier.answer(row, top=2)
    assert ask(server, "GET", "/health") == (200, {"status": "ok"})
    assert ask(server, "GET", "/model")[1]["classes"] == list(classifier.classes)


def test_http_refuses(server):
    assert ask(server, "POST", "/predict", b"no image")[0] == 400
    assert ask(server, "POST", "/predict", b"")[0] == 400
    assert ask(server, "POST", "/predict", b"x" * 20_001)[0] == 413
    assert ask(server, "POST", "/elsewhere", b"x")[0] == 404
    assert ask(server, "GET", "/elsewhere")[0] == 404
    chunked = {"Transfer-Encoding": "chunked"}
    assert ask(server, "POST", "/predict", iter([b"x"]), chunked)[0] == 411
    huge = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + b"\x00\x01\x00\x00" * 2
    huge += b"\x08\x02\x00\x00\x00" + b"\x00" * 4
    assert ask(server, "POST", "/predict", huge)[0] == 400  # 65,536 pixels a side, never decoded
    assert ask(server, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["none.pth", "--image", "x.png"], 1, "no such model"),
        (["{model}", "--image", "none.png"], 1, "none.png"),
        (["{model}", "--dir", "none"], 1, "no such folder"),
        (["{model}", "--image", "x.png", "--backend", "onnxruntime"], 1, "a file for torch"),
        (["{model}", "--image", "x.png", "--csv", "x.csv"], 2, "for --dir"),
        (["{model}", "--dir", ".", "--csv", "x.txt"], 2, "ends in .csv"),
        (["{model}", "--dir", ".", "--batch", "0"], 2, "1 or more"),
        (["{model}", "--image", "x.png", "--batch", "2"], 2, "for --dir"),
        (["{model}", "--image", "x.png", "--max-mb", "2"], 2, "for --http"),
        (["{model}", "--dir", ".", "--csv", "x.csv", "--top", "2"], 2, "expected --json"),
        (["{model}"], 2, "required"),
        (["{model}", "--http", "8080"], 2, "HOST:PORT"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, finished, command, argv, code, said):
    monkeypatch.chdir(tmp_path)
    model = finished[0] / "checkpoints" / "student.pth"
    done = command(*[word.format(model=model) for word in argv], entry=infer.main)
    assert done.code == code and said in done.err


def test_threads_are_torchs_too(finished, images, command):
    model = finished[0] / "checkpoints" / "student.pth"
    done = command(model, "--image", images / "0.png", "--threads", 2, entry=infer.main)
    assert done.code == 0 and torch.get_num_threads() == 2  # put back by the fixture


def test_addresses():
    assert parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    for text in ("localhost", ":80", "a:70000", "a:b"):
        with pytest.raises(UsageError):
            parse_address(text)
