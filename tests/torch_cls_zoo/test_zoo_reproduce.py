"""The experiments: each row's command, a tiny one that runs, stops and goes on, and the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared_core.runs import check_record, read_result
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.sample_files import read_sample_file, write_sample_file
from torch_cls_zoo.experiments import cells as cells_module
from torch_cls_zoo.experiments import command
from torch_cls_zoo.experiments.cells import Bench
from torch_cls_zoo.experiments.page import summarize_rows
from torch_cls_zoo.experiments.recipes import SCALES, recipe
from torch_cls_zoo.experiments.rows import EXPERIMENTS, MODELS, Row


@pytest.fixture
def tiny(monkeypatch):
    """The rehearsal, smaller still."""
    small = replace(
        recipe("rehearsal", "criteria"), larger="test_resnet", image_size=16, epochs=2, images=15,
        batch_size=8, schedule=(),
    )  # fmt: skip
    monkeypatch.setattr(command, "recipe", lambda scale, experiment: small)


@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
@pytest.mark.parametrize("scale", SCALES)
def test_every_row_s_command_is_read_and_only_differs_by_its_own_words(
    experiment, scale, tmp_path, monkeypatch
):
    bench = Bench(tmp_path, experiment, recipe(scale, experiment), None)
    monkeypatch.setattr(Bench, "_sources", lambda self, row, seed: self.files_of(row.label, seed))
    args = {row.name: parse(bench.words(row, 7)) for row in EXPERIMENTS[experiment]}
    for name, one in args.items():
        assert one.train and one.seed == 7, name
    if experiment == "criteria":
        shared = ("arch", "epochs", "lr", "batch_size", "aug_policy", "image_size", "lr_ratios")
        for key in shared:
            assert len({str(getattr(one, key)) for one in args.values()}) == 1
        assert [one.ghm_loss for one in args.values()].count(True) == 1
    if experiment == "augment":
        assert args["-aug"].aug_policy is None and args["baseline (bce+aug)"].aug_policy == "my"
        assert args["AutoAugment for MyAugment"].aug_policy == "imagenet"
        assert args["+multi-scale"].multi_scale and args["+mixup"].mixup


def test_the_published_column_is_the_readme_s():
    table = {row.name: row.published for rows in EXPERIMENTS.values() for row in rows}
    # The two tables of the first README, by hand.
    want = {"softmax": 89.2, "bce loss": 89.0, "threshold bce": 88.95, "ghm bce": 89.3,
            "weighted bce": 89.1, "ohm bce": 89.1, "baseline (bce+aug)": 89.0,
            "-pretrained": 85.97, "-aug": 87.76, "+multi-scale": 89.02, "+mixup": 88.63,
            "+distill from b0+ghm": 88.55}  # fmt: skip
    for name, percent in want.items():
        assert table[name] == pytest.approx(percent / 100)
    assert [row.name for row in MODELS] == [
        "resnet18", "resnet50", "shufflenet_v2_x1_0", "shufflenet_v2_x2_0", "mobilenet_v2",
        "mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "efficientnet_b4",
    ]  # fmt: skip


def test_pretrained_is_taken_out_of_its_row(tmp_path):
    bench = Bench(tmp_path, "augment", recipe("full", "augment"), None,
                  extra=["--pretrained", "w.pth"])  # fmt: skip
    rows = {row.name: row for row in EXPERIMENTS["augment"]}
    assert "--pretrained" in bench.words(rows["baseline (bce+aug)"], 0)
    words = bench.words(rows["-pretrained"], 0)
    assert "--pretrained" not in words and "w.pth" not in words


def test_means_and_paired_differences_are_those_by_hand():
    def cell(value):
        return {"accuracy": value, "macro_f1": 0.5, "val_accuracy": 0.5, "seconds": 1.0,
                "best_epoch": 2, "parameters": 10}  # fmt: skip

    cells = {"a": {0: cell(0.5), 1: cell(0.6), 2: cell(0.7)},
             "b": {0: cell(0.6), 1: cell(0.6), 2: cell(0.9)}}  # fmt: skip
    rows = [Row("a"), Row("b", published=0.89), Row("c", skip=(("short", "too large"),))]
    found = summarize_rows(rows, cells, scale="short")
    assert found["a"]["accuracy"] == pytest.approx({"mean": 0.6, "std": 0.1, "n": 3})
    gap = found["b"]["difference"]
    differences = np.array([0.1, 0.0, 0.2])
    assert gap["mean"] == pytest.approx(0.1) and gap["wins"] == 2
    reach = 4.302652729911275 * differences.std(ddof=1) / 3**0.5  # t(0.975, 2)
    assert (gap["low"], gap["high"]) == pytest.approx((0.1 - reach, 0.1 + reach))
    assert found["c"]["not_run"] == "too large" and "accuracy" not in found["c"]


def test_a_rehearsal_runs_and_says_what_it_is(tiny, zoo_reproduce, tmp_path):
    out = tmp_path / "run"
    done = zoo_reproduce("criteria", "--scale", "rehearsal", "--output", out, "--seeds", 0, 1,
                         "--rows", "softmax", "weighted bce")  # fmt: skip
    assert done.code == 0, done.err
    lines = done.out.strip().splitlines()
    assert lines[0].startswith("REHEARSAL") and lines[-1] == lines[0]
    record = read_result(out / "result.json")
    check_record(record)
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    rows = record["measured"]["rows"]
    assert list(rows) == ["softmax", "weighted bce"]
    assert rows["softmax"]["accuracy"]["n"] == 2 and "difference" in rows["weighted bce"]
    page = (out / "report.md").read_text()
    assert "not comparable" in page and "0.8920" in page and "plain features" in page
    assert not list((out / "cells").glob("*/checkpoints"))  # what is large is taken away
    again = zoo_reproduce("criteria", "--scale", "rehearsal", "--output", out)
    assert again.code == 2 and "--continue or --fresh" in again.err
    words = ("criteria", "--scale", "rehearsal", "--output", out, "--seeds", 0, 1, "--rows",
             "softmax", "weighted bce", "--continue")  # fmt: skip
    before = {name: value["values"] for name, value in rows.items()}
    assert zoo_reproduce(*words).code == 0
    after = read_result(out / "result.json")["measured"]["rows"]
    assert {name: value["values"] for name, value in after.items()} == before


def test_a_stopped_experiment_goes_on_in_the_middle_of_a_cell(
    tiny, zoo_reproduce, tmp_path, monkeypatch
):
    words = ["criteria", "--scale", "rehearsal", "--seeds", 0, "--rows", "softmax", "bce loss"]
    whole = zoo_reproduce(*words, "--output", tmp_path / "whole")
    assert whole.code == 0, whole.err
    real, count = cells_module.run, []

    def interrupted(args, world, *, data):
        from torch_cls_zoo.applications import run_state

        saved = run_state.RunState.save

        def save(self, epoch, sums, *, unreadable=None):
            saved(self, epoch, sums, unreadable=unreadable)
            count.append(epoch)
            if len(count) == 3:  # the second cell, after its first epoch
                raise KeyboardInterrupt

        monkeypatch.setattr(run_state.RunState, "save", save)
        try:
            return real(args, world, data=data)
        finally:
            monkeypatch.setattr(run_state.RunState, "save", saved)

    monkeypatch.setattr(cells_module, "run", interrupted)
    stopped = zoo_reproduce(*words, "--output", tmp_path / "stopped")
    assert stopped.code == 130
    monkeypatch.setattr(cells_module, "run", real)
    done = zoo_reproduce(*words, "--output", tmp_path / "stopped", "--continue")
    assert done.code == 0, done.err
    (log,) = (tmp_path / "stopped" / "cells").glob("bce*.log")
    assert "going on at epoch 2" in log.read_text()
    mine, theirs = (
        read_result(tmp_path / name / "result.json")["measured"]["rows"]
        for name in ("stopped", "whole")
    )
    assert {n: r["values"] for n, r in mine.items()} == {n: r["values"] for n, r in theirs.items()}


def test_students_get_the_files_of_their_teachers(tiny, zoo_reproduce, tmp_path):
    out = tmp_path / "run"
    done = zoo_reproduce("distill", "--scale", "rehearsal", "--output", out, "--seeds", 0,
                         "--rows", "from it, averaged with the labels")  # fmt: skip
    assert done.code == 0, done.err
    rows = read_result(out / "result.json")["measured"]["rows"]
    assert list(rows) == ["teacher: same net, ghm", "from it, averaged with the labels"]
    folder = out / "files" / "from-it--averaged-with-the-labels-s0"
    teacher = read_sample_file(folder / "distill_0.txt")
    labels = read_sample_file(folder / "distill_1.txt")
    assert set(np.unique(labels.values)) == {0.0, 1.0}
    assert teacher.names == labels.names and teacher.about["what"] == "teacher"


def test_the_control_has_the_same_weights_on_other_images(tmp_path):
    names = [f"train/a/{n}.jpg" for n in range(30)]
    weights = np.linspace(0.1, 1, 30)[:, None]
    bench = Bench(tmp_path, "curriculum", recipe("rehearsal", "curriculum"), None)
    rows = {row.name: row for row in EXPERIMENTS["curriculum"]}
    source = bench.files_of(rows["no curriculum"].label, 3)
    write_sample_file(source / "curriculum.txt", names, weights, about={})
    dealt = read_sample_file(
        bench._sources(rows["its weights dealt out at random"], 3) / "curriculum.txt"
    )
    kept = read_sample_file(bench._sources(rows["curriculum of that run"], 3) / "curriculum.txt")
    np.testing.assert_array_equal(kept.values, weights)
    assert dealt.names == kept.names and not np.array_equal(dealt.values, weights)
    np.testing.assert_array_equal(np.sort(dealt.values, axis=0), weights)


def test_what_cannot_run_is_refused(zoo_reproduce, zoo_data, tmp_path):
    for words, message in (
        (["criteria", "--scale", "short", "--data-root", tmp_path], "clothing-10 is not below"),
        (["criteria", "--data-path", tmp_path / "no"], "no such folder"),
        (["criteria", "--rows", "hinge"], "expected some of softmax"),
        (["criteria", "--seeds", 1, 1], "different numbers"),
    ):
        done = zoo_reproduce(*words, "--output", tmp_path / "o")
        assert done.code in (1, 2) and message in done.err and done.err.count("\n") == 1


def test_a_user_s_folder_is_decoded_once_and_gives_the_files_pixels(zoo_data, tmp_path):
    from torch_cls_zoo.experiments.data import open_images

    data = open_images(zoo_data, tmp_path, known=False, classes=0, images=0, cache_side=64)
    assert data.kind == "real" and (tmp_path / "cache" / "pixels.bin").exists()
    plain = open_images(zoo_data, tmp_path / "p", known=False, classes=0, images=0, cache_side=0)
    for split in ("train", "test"):
        mine, theirs = data.image_set(split), plain.image_set(split)
        for n in range(len(mine)):
            np.testing.assert_array_equal(mine.image(n), theirs.image(n))
        assert mine.paths == theirs.paths
    shutil.rmtree(tmp_path / "cache")


def test_the_scale_follows_the_data(monkeypatch, zoo_reproduce, zoo_data, tmp_path):
    seen = []

    def stop(bench, log, rows, seeds):
        seen.append((bench.data.kind, json.loads((bench.folder / "config.json").read_text())))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run_cells", stop)
    zoo_reproduce("criteria", "--data-path", zoo_data, "--output", tmp_path / "a")
    zoo_reproduce("criteria", "--data-root", tmp_path / "none", "--output", tmp_path / "b")
    assert [(kind, config["scale"]) for kind, config in seen] == [
        ("real", "full"), ("built-in", "rehearsal"),
    ]  # fmt: skip
    assert seen[0][1]["recipe"]["arch"] == "efficientnet_b0"
    assert Path(seen[0][1]["data"]) == zoo_data
