"""inference.py says what evaluation says, in the README's words, and refuses the rest.

How files are found, shown and written down is the core's, and is tested there.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import vgc_tools as tools

from shared_core import datasets
from shared_core.datasets.finding.scan import list_images
from shared_core.deploy.options import ModelOptions
from shared_core.deploy.predictor import open_asked
from shared_core.for_paddle.accuracy import answers_of
from shared_core.for_paddle.data import Normalizer, PaddleLoader
from shared_core.for_paddle.distributed import World
from shared_core.metrics import softmax
from visiondistill_gc import inference
from visiondistill_gc.deploy.openers import OPENERS, facts_of
from visiondistill_gc.utils.model_files import load_model
from visiondistill_gc.utils.transforms import eval_view

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
        "--batch_size", "4", "--top_k", "2", "--num_workers", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"Processed 9 images in directory: {folder}"
    said = json.loads((tmp_path / "o.json").read_text())
    names = [Path(row["path"]).name for row in said["images"]]
    assert sorted(names) == [f"{n}.png" for n in range(9)]
    order = [int(Path(name).stem) for name in names]
    got = np.array([row["probabilities"] for row in said["images"]])
    np.testing.assert_allclose(got, truth[order], atol=3e-4)  # a steep little network
    for row, p in zip(said["images"], truth[order], strict=True):
        best = np.argsort(-p)[:2]
        assert [one["class"] for one in row["top"]] == [CLASSES[k] for k in best]
        assert row["class"] == CLASSES[best[0]]
    assert said["class_names"] == list(CLASSES) and said["bad"] == []
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = [[float(row[f"p({name})"]) for name in CLASSES] for row in rows]
    np.testing.assert_allclose(table, got)


def test_answers_are_those_of_evaluation(model, folder):
    """Same files through the loader, view and normaliser that training evaluates with."""
    paths = list_images([folder]).files
    loaded = load_model(model)
    images = datasets.ImageSet(paths, [0] * len(paths))
    loader = datasets.BatchLoader(images, view=eval_view(loaded.input_size), batch_size=16)
    found = answers_of(
        loaded.net,
        PaddleLoader(loader, Normalizer(loaded.mean, loaded.std)),
        World(0, 1, "cpu"),
    )
    predictor = open_asked(ModelOptions(model), openers=OPENERS)
    assert predictor.view.settings() == eval_view(loaded.input_size).settings()
    views = np.concatenate([batch.images.copy() for batch in loader])
    wanted = softmax(found.logits).astype(np.float32)
    np.testing.assert_allclose(predictor.probabilities(views), wanted, rtol=1e-6)
    facts = facts_of(loaded)
    pixels = Normalizer(loaded.mean, loaded.std)(views).numpy()
    assert np.array_equal(facts.normalise(views), pixels)  # bit by bit


def test_bad_files_are_named_the_rest_is_classified_and_the_exit_code_says_so(
    model, folder, tmp_path
):
    shutil.copy(folder / "0.png", tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes((folder / "1.png").read_bytes()[:60])
    done = run(model, tmp_path, "--json", tmp_path / "o.json")
    assert done.code == 1
    assert "Processed 1 images" in done.out and "b.png" in done.out
    assert "a.png" in done.err and "c.jpg" in done.err and "Traceback" not in done.err
    bad = json.loads((tmp_path / "o.json").read_text())["bad"]
    assert [Path(one["path"]).name for one in bad] == ["a.png", "c.jpg"]


def test_categories_come_with_the_model_and_a_contradiction_is_an_error(model, folder):
    image = folder / "0.png"
    assert run(model, image, "--categories", *CLASSES).code == 0
    for words in (CLASSES[:3], (*CLASSES, "Fifth"), CLASSES[::-1], ("a", "b", "c", "d")):
        done = run(model, image, "--categories", *words)
        assert done.code == 1 and done.out == ""
        assert done.err.startswith("error: ") and done.err.count("\n") == 1
        assert "--categories" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--use_gpu"], "use_gpu"),
        (["--runtime", "onnx"], "expected a folder"),
        (["--device", "tpu"], "--device tpu"),
        (["--batch_size", "0"], "batch_size"),
        (["--top_k", "-1"], "top_k"),
    ],
)
def test_flags_work_or_are_refused(model, folder, words, said):
    if words == ["--use_gpu"] and paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle has CUDA")
    done = run(model, folder / "0.png", *words)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_missing_things(model, folder, tmp_path):
    for words in ((tmp_path / "none.pdparams", folder), (model, tmp_path / "none.png")):
        done = run(*words)
        assert done.code == 1 and "none.p" in done.err and done.err.count("\n") <= 2
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
    assert done.code == 0 and (tmp_path / "inference_results" / "3.png.png").is_file()
    done = run(model, folder / "3.png", "--show", "--show_dir", tmp_path / "shown")
    assert done.code == 0 and (tmp_path / "shown" / "3.png.png").is_file()


def test_the_script_from_another_folder(model, folder, tmp_path):
    words = ["--model_path", model, "--image_path", folder / "0.png"]
    done = subprocess.run(
        [sys.executable, tools.PACKAGE / "inference.py", *words],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "--> Predicted: " in done.stdout, done.stderr
    assert done.stderr == ""
