"""From a folder and a manifest to a shipped student: the four lines of the README in turn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shared_core.datasets.reading.decode import decode
from shared_core.datasets.splitting.manifest import Manifest
from shared_core.deploy.predictor import open_model
from shared_core.runs import read_result
from torch_cls_zoo.applications.openers import OPENERS
from torch_cls_zoo.dataloader.folders import open_data
from torch_cls_zoo.dataloader.sample_files import read_sample_file

HOW = ("-b", "8", "--threads", "1", "-j", "1", "--no-cuda")


@pytest.fixture(scope="module")
def journey(tmp_path_factory, zoo_folder, zoo_command):
    """The folders of all steps, each run with the manifest of another run."""
    root = tmp_path_factory.mktemp("journey")
    counts = {"train": 20, "val": 1, "test": 1}
    data = zoo_folder(root / "images", counts=counts, noise=90) / "train"  # a folder of classes
    open_data(str(data), root / "first", seed=5)
    shared = ("--data-path", data, "--split", root / "first" / "split.json", *HOW)

    def run(*words):
        done = zoo_command(*words, *shared)
        assert done.code == 0, done.err

    scratch = ("--init", "none", "--recipe", "scratch", "--epochs", "3", "--no-floor")
    run(
        "--train", "-a", "test_resnet", "--input-size", "32", *scratch, "--output", root / "teacher"
    )
    best = root / "teacher" / "checkpoints" / "model_best_test_resnet.pth"
    answers = ("--knowledge_dir", root / "answers")
    run("--knowledge", "train", "--resume", best, *answers, "--output", root / "answers")
    run("--train", "--distill", *answers, "-a", "test_efficientnet", "--input-size", "24", *scratch,
        "--output", root / "student")  # fmt: skip
    best = root / "student" / "checkpoints" / "model_best_test_efficientnet.pth"
    run("--export", "--int8", "yes", "--max_accuracy_loss", "1", "--resume", best,
        "--output", root / "student")  # fmt: skip
    return root, data, Manifest.read(root / "first" / "split.json", root=data)


def test_every_step_works_on_the_manifest_s_parts(journey):
    root, _data, manifest = journey
    names = {part: [one.path for one in manifest.subset(part)] for part in manifest.splits}
    assert sorted(read_sample_file(root / "answers" / "distill.txt").names) == sorted(
        names["train"]
    )
    for run in ("teacher", "student"):
        measured = read_result(root / run / "result.json")["measured"]["test"]
        assert measured["images"] == len(names["test"])
    facts = json.loads((root / "student" / "model" / "model.json").read_text())
    assert facts["provenance"]["split_hash"] == manifest.hash
    assert facts["provenance"]["learned_from"] == "knowledge files"
    assert facts["input_size"] == [24, 24]


@pytest.mark.parametrize("runtime", ["onnx", "onnx-int8"])
def test_what_is_shipped_gives_the_accuracy_that_it_states(journey, runtime):
    root, data, manifest = journey
    model = open_model(root / "student" / "model", runtime=runtime)
    rows = manifest.subset("test")
    images = np.stack([model.view(decode(data / row.path)) for row in rows])
    found = model.probabilities(images)
    right = float((found.argmax(axis=1) == [row.label for row in rows]).mean())
    assert right == pytest.approx(model.facts.measured["files"][runtime]["accuracy"]["value"])
    if runtime == "onnx":
        tested = read_result(root / "student" / "result.json")["measured"]["test"]
        assert right == pytest.approx(tested["accuracy"])
        (best,) = (root / "student" / "checkpoints").glob("model_best_*")
        trained = open_model(best, openers=OPENERS)
        np.testing.assert_allclose(found, trained.probabilities(images), atol=1e-4)
