"""Class folders of one's own, end to end: a manifest, trained starts, a model folder, its users."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpkd.analysis.verdicts import against, helped, verdicts
from mpkd.utils.common import load_net
from shared_core import smallvision
from shared_core.runs import read_result
from shared_core.weights.catalogue import entry
from shared_core.weights.finding import installed_file

needs_lite0 = pytest.mark.skipif(
    installed_file(entry("lite0")) is None, reason="needs the weights package of lite0"
)


def words(images, output, *more: str) -> list[str]:
    """The journey's words, small: 32 pixels, an epoch of each."""
    return [
        "--data-path", str(images), "--input-size", "32", "--epochs", "1", "--batch-size", "16",
        "--seed", "0", "--threads", "1", "--workers", "0", "--output", str(output), "--fresh",
        "--set", "model.teacher_model=lite0", "--set", "teacher.epochs=1",
        "--set", "distillation.views=1", "--set", "export.slower_int8=true",
        "--set", "export.max_accuracy_loss=1.0", "--set", "quantization.calib_samples=32",
        "--set", "quantization.epochs=1", "--set", "dataset.val_split=0.2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory, image_folder):
    return image_folder(
        tmp_path_factory.mktemp("own") / "photos", ("a", "b", "c"), images=20, size=40
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory, images, command):
    """A run on class folders, from trained weights, and what it said."""
    folder = tmp_path_factory.mktemp("first") / "run"
    done = command(*words(images, folder))
    assert done.code == 0, done.err
    return folder, done


def evaluated(folder, images, split, target, command, *more: str) -> dict:
    done = command(
        "evaluate", folder, images, "--split", split, "--json", target, "--threads", "1", *more,
        entry=smallvision.main,
    )  # fmt: skip
    assert done.code == 0, done.err
    return json.loads(target.read_text())


@needs_lite0
def test_the_model_folder_answers_as_the_run_measured(first, images, tmp_path, command):
    """``smallvision`` opens it; the accuracy on the manifest's test images is the recorded one."""
    folder, _ = first
    record = read_result(folder / "result.json")["measured"]
    facts = json.loads((folder / "export" / "model.json").read_text())
    assert (folder / "export" / "model.int8.onnx").is_file()
    for runtime in ("onnx", "onnx-int8"):
        found = evaluated(folder / "export", images, folder / "split.json",
                          tmp_path / "e.json", command, "--runtime", runtime)  # fmt: skip
        shipped = facts["measured"]["files"][runtime]["accuracy"]["value"]
        assert found["accuracy"]["value"] == pytest.approx(shipped)
    assert facts["measured"]["files"]["onnx"]["accuracy"]["value"] == pytest.approx(
        record["distil"]["test_accuracy"]
    )
    done = command(
        "predict", folder / "export", images / "a", "--json", tmp_path / "p.json",
        entry=smallvision.main,
    )  # fmt: skip
    assert done.code == 0
    answers = json.loads((tmp_path / "p.json").read_text())["images"]
    assert len(answers) == 20 and {row["class"] for row in answers} <= {"a", "b", "c"}


@needs_lite0
def test_floor_and_teacher_stand_in_the_last_line_and_the_first_paragraph(first):
    folder, done = first
    measured = read_result(folder / "result.json")["measured"]
    assert measured["teacher"]["start"]["name"] == "efficientnet_lite0"
    found = measured["distil"]["test_accuracy"]
    floor = measured["teacher"]["floor"]["accuracy"]
    word = "above" if found > floor else "BELOW" if found < floor else "equal to"
    said = f"is {word} trained features, linear ({floor:.4f})"
    plain = measured["floors"]["plain features, linear"]["accuracy"]
    assert said in done.out.strip().splitlines()[-1]
    page = (folder / "outputs" / "report.md").read_text()
    paragraph = next(p for p in page.split("\n\n")[1:] if p.strip())
    assert said in paragraph and f"plain features, linear ({plain:.4f})" in paragraph


@needs_lite0
@pytest.mark.parametrize(
    "mode",
    [
        ["quantization.method=ptq"],
        ["quantization.method=qat", "quantization.w_bits=4", "quantization.a_bits=8"],
    ],
    ids=["int8 PTQ", "W4A8"],
)
def test_few_bits_are_shipped(first, images, tmp_path, command, mode):
    """The same split by its manifest, the teacher of the first run; bits by the configuration."""
    folder, _ = first
    given = tmp_path / "given.json"
    given.write_bytes((folder / "split.json").read_bytes())
    settings = [part for one in mode for part in ("--set", one)]
    done = command(*words(
        images, tmp_path / "run", "--split", str(given),
        "--init", str(folder / "checkpoints" / "teacher.pth"), *settings,
    ))  # fmt: skip
    assert done.code == 0, done.err
    record = read_result(tmp_path / "run" / "result.json")
    assert record["data"]["split_hash"] == read_result(folder / "result.json")["data"]["split_hash"]
    student, known = load_net(tmp_path / "run" / "checkpoints" / "student_packed.safetensors")
    bits = set(known["quantization"]["w_bits"].values())
    assert bits == ({8} if "ptq" in mode[0] else {4, 8})
    found = evaluated(tmp_path / "run" / "export", images, given, tmp_path / "e.json", command)
    wanted = record["measured"]["quantize"]["test_accuracy"]
    assert found["accuracy"]["value"] == pytest.approx(wanted, abs=1 / 12 + 1e-9)


# -- sentences ------------------------------------------------------------------------------------


def test_sentences_by_hand():
    floors = {"a line": {"accuracy": 0.5}}
    assert against(0.4, floors, "student") == [
        "The student, 0.4000 on the test images, is BELOW a line (0.5000)."
    ]
    assert "is above" in against(0.6, floors, "student")[0]
    stages = {"teacher": {"test_accuracy": 0.9, "floor": {"accuracy": 0.8}},
              "distil": {"test_accuracy": 0.85}}  # fmt: skip
    assert verdicts(stages) == [
        "The student, 0.8500 on the test images, is above trained features, linear (0.8000).",
        "The teacher, 0.9000, is 5.0 points above the student.",
    ]
    few = stages | {"quantize": {"test_accuracy": 0.95}}
    assert "NOT ABOVE" in verdicts(few)[1] and "0.9500" in verdicts(few)[0]
    assert verdicts({"teacher": stages["teacher"]}) == []


@pytest.mark.parametrize(
    ("values", "word"),
    [((0.01, 0.03), "helped:"), ((-0.03, -0.01), "did not help, it hurt:"),
     ((-0.01, 0.02), "did not help for sure:")],
)  # fmt: skip
def test_distillation_helped_only_where_its_interval_says_so(values, word):
    low, high = values
    gap = {"mean": float(np.mean(values)), "low": low, "high": high, "n": 3}
    said = helped(gap, "KD against labels")
    assert said.startswith(f"Distillation {word}") and "3 seeds; KD against labels" in said
