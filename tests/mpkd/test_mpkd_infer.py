"""Inference: this project's words for the core's commands, and what only it opens."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mpkd.dataset.sources import load_data
from mpkd.deploy.openers import OPENERS
from mpkd.inference import infer, server
from mpkd.inference.infer import parse_address, wanted
from mpkd.utils.common import load_net
from mpkd.utils.config import load_config
from shared_core.deploy.options import ServeOptions
from shared_core.deploy.predictor import open_model
from shared_core.runs import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory, finished):
    """The run's own test images as files, and a file that is no image."""
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


def test_single_folder_stdin_and_csv_say_the_same(
    tmp_path, monkeypatch, capsys, finished, images, command
):
    model = finished[0] / "checkpoints" / "student.pth"
    out = tmp_path / "rows.csv"
    done = command(model, "--dir", images, "--csv", out, "--batch", 2, entry=infer.main)
    assert done.code == 1 and "odd.jpg" in done.err  # one could not be read, five are answered
    with out.open(newline="") as stream:
        rows = {row["path"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 6 and rows[str(images / "odd.jpg")]["error"]
    lines = "".join(f"{images}/{n}.png\n" for n in range(5))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    done = command(model, "--stdin", entry=infer.main)
    assert done.code == 0
    said = [json.loads(line) for line in done.out.splitlines()]
    assert len(said) == 5
    for one in said:
        assert one["class"] == rows[one["path"]]["class"]
        assert one["probability"] == pytest.approx(float(rows[one["path"]]["probability"]))
        assert one["top"][0]["probability"] >= one["top"][1]["probability"]
    done = command(model, "--image", images / "0.png", "--top", 1, entry=infer.main)
    assert done.code == 0 and rows[str(images / "0.png")]["class"] in done.out


def test_the_image_is_prepared_as_validation_prepares_it(finished, images):
    """The probabilities of a file are those of the network on the run's own test image."""
    checkpoint = finished[0] / "checkpoints" / "student_quantized.pth"
    found = open_model(checkpoint, openers=OPENERS)
    pixels = np.stack([cv2.imread(str(images / f"{n}.png"))[:, :, ::-1] for n in range(5)])
    net, facts = load_net(checkpoint)
    mean, std = (np.array(facts[key], np.float32) for key in ("mean", "std"))
    normal = ((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        wanted = net(torch.from_numpy(normal.copy())).softmax(1).numpy()
    np.testing.assert_allclose(found.probabilities(np.ascontiguousarray(pixels)), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "runtime"),
    [("auto", "onnx"), ("onnxruntime", "onnx"), ("packed", "torch")],
)
def test_backends_agree_on_a_folder(finished, images, command, backend, runtime):
    export = finished[0] / "export"
    words = (export, "--dir", images, "--backend", backend, "--format", "jsonl")
    done = command(*words, entry=infer.main)
    rows = [json.loads(line) for line in done.out.splitlines()]
    plain = open_model(finished[0] / "checkpoints" / "student_quantized.pth", openers=OPENERS)
    views = [plain.view(cv2.imread(r["path"])[:, :, ::-1].copy()) for r in rows if "error" not in r]
    wanted = plain.probabilities(np.stack(views)).max(axis=1)
    got = [row["probability"] for row in rows if "error" not in row]
    np.testing.assert_allclose(got, wanted, atol=0.05)
    assert open_model(
        export, runtime={"onnxruntime": "onnx"}.get(backend, backend), openers=OPENERS
    ).runtime == runtime  # fmt: skip


def test_http_is_the_cores_service(monkeypatch, finished, command):
    """The words of both commands reach it; what it does is tested with the core."""
    asked = []
    monkeypatch.setattr(
        "shared_core.deploy.service.command.serve",
        lambda predictor, options: asked.append((predictor, options)) or 0,
    )
    model = finished[0] / "export"
    assert command(model, "--http", "127.0.0.1:0", "--max-mb", 2, entry=infer.main).code == 0
    assert command(model, "--port", 0, "--max-files", 3, entry=server.main).code == 0
    (first, one), (_, two) = asked
    assert first.facts.project == "mpkd"
    assert one == ServeOptions(host="127.0.0.1", port=0, max_mb=2.0)
    assert two == ServeOptions(port=0, max_files=3)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["none.pth", "--image", "x.png"], 1, "none.pth does not exist"),
        (["{model}", "--image", "none.png"], 1, "none.png"),
        (["{model}", "--image", "x.png", "--backend", "onnxruntime"], 2, "a file for torch"),
        (["{model}", "--dir", ".", "--batch", "0"], 2, "batch"),
        (["{model}", "--image", "x.png", "--max-mb", "2"], 2, "for --http"),
        (["{model}"], 2, "nothing to classify"),
        (["{model}", "--http", "8080"], 2, "HOST:PORT"),
        (["{model}", "--http", "127.0.0.1:0", "--dir", "."], 2, "expected no images"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, finished, command, argv, code, said):
    monkeypatch.chdir(tmp_path)
    model = finished[0] / "checkpoints" / "student.pth"
    done = command(*[word.format(model=model) for word in argv], entry=infer.main)
    assert done.code == code and said in done.err, done.err


def test_threads_are_torchs_too(finished, images, command):
    model = finished[0] / "checkpoints" / "student.pth"
    done = command(model, "--image", images / "0.png", "--threads", 2, entry=infer.main)
    assert done.code == 0 and torch.get_num_threads() == 2  # put back by the fixture


def test_addresses():
    assert parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    for text in ("localhost", ":80", "a:70000", "a:b"):
        with pytest.raises(UsageError):
            parse_address(text)
    args = infer.build_parser().parse_args(["m", "--stdin"])
    assert wanted(args, set()).paths == ("-",) and wanted(args, set()).format == "jsonl"
    assert Path(infer.__file__).name == "infer.py"
