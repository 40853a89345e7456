"""The pages: figures without a display, numbers of the record, comparison, what is refused."""

from __future__ import annotations

import json
import shutil

import cv2
import pytest

from mpkd.analysis import analysis
from shared_core.runs import read_result


def picture(path):
    image = cv2.imread(str(path))
    assert image is not None and image.std() > 5, path  # drawn, not blank
    return image


def test_a_run_draws_its_page(finished):
    folder, _ = finished
    outputs = folder / "outputs"
    names = {
        "report.md",
        "report.html",
        "accuracy_size.png",
        "bits.png",
        f"curves_{folder.name}.png",
    }
    assert names <= {path.name for path in outputs.iterdir()}
    for path in outputs.glob("*.png"):
        picture(path)
    text = (outputs / "report.md").read_text()
    measured = read_result(folder / "result.json")["measured"]
    assert "Built-in data" in text
    assert f"| {measured['distil']['test_accuracy']:.4g} |" in text
    assert f"{measured['quantize']['bytes'] / 1024:.4g}" in text
    shipped = measured["export"]["measured"]["files"]["onnx"]
    size = (folder / "export" / "model.onnx").stat().st_size / 1024
    assert f"| shipped for onnx | {shipped['accuracy']['value']:.4g} |" in text
    assert f"{size:.4g}" in text


def test_two_runs_side_by_side(tmp_path, finished, command):
    other = tmp_path / "other"
    shutil.copytree(finished[0], other)
    config = json.loads((other / "config.json").read_text())
    config["distillation.temperature"] = 9.0
    (other / "config.json").write_text(json.dumps(config))
    done = command(finished[0], other, "--output", tmp_path / "page", entry=analysis.main)
    assert done.code == 0, done.err
    text = (tmp_path / "page" / "report.md").read_text()
    assert "Settings that differ" in text and "| distillation.temperature | 4.0 | 9.0 |" in text
    assert text.count("| experiment.") == 0  # what is equal is not listed
    assert "other: student (simple_cnn)" in text


def test_runs_of_one_name_are_told_apart(tmp_path, finished, command):
    folders = [tmp_path / "monday" / "mpkd", tmp_path / "friday" / "mpkd"]
    for folder in folders:
        shutil.copytree(finished[0], folder)
    done = command(*folders, "--output", tmp_path / "page", entry=analysis.main)
    assert done.code == 0, done.err
    text = (tmp_path / "page" / "report.md").read_text()
    for day in ("monday", "friday"):
        assert f"{day}-mpkd: student (simple_cnn)" in text
        assert (tmp_path / "page" / f"curves_{day}-mpkd.png").exists()
    assert analysis.distinct_names(["a/x", "b/y"]) == ["x", "y"]
    assert len(set(analysis.distinct_names(["a", "a"]))) == 2


def test_a_run_without_epochs_is_a_page_too(tmp_path, words, command):
    folder = tmp_path / "run"
    assert command(*words(folder, "--stage", "prepare")).code == 0
    pages = analysis.write_report([folder], tmp_path / "page")
    assert "no epoch is finished" in pages[0].read_text()


def test_no_run_is_one_line(tmp_path, command):
    done = command(tmp_path, entry=analysis.main)
    assert done.code == 1 and "no run of mpkd" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_the_front_is_that_of_brute_force(tmp_path, rows):
    from mpkd.analysis import plots

    points = [("a", 4.0, 0.9), ("b", 2.0, 0.95), ("c", 1.0, 0.5)][:rows]
    picture(plots.pareto(tmp_path / "p.png", points, xlabel="KiB"))
