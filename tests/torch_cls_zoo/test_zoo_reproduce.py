"""The experiments: each row's command, a tiny one that runs, stops and goes on, and the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared_core.runs import check_record, read_result
from shared_core.trials import Cell, Trials
from torch_cls_zoo.applications.train import Training
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.sample_files import read_sample_file, write_sample_file
from torch_cls_zoo.experiments import command
from torch_cls_zoo.experiments.cells import Bench, cells_of, words_of_row
from torch_cls_zoo.experiments.page import summarize_rows, verdicts
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


def cell_of(row: Row, seed: int, settings, **more) -> Cell:
    return cells_of([row], [seed], settings, split_hash="h", **more)[0]


@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
@pytest.mark.parametrize("scale", SCALES)
def test_every_row_s_command_is_read_and_only_differs_by_its_own_words(
    experiment, scale, tmp_path, monkeypatch
):
    rows = {row.name: row for row in EXPERIMENTS[experiment]}
    bench, settings = Bench(tmp_path, None, rows), recipe(scale, experiment)
    monkeypatch.setattr(Bench, "_gather", lambda self, row, seed, target: None)
    configs = {name: parse(bench.command(cell_of(row, 7, settings), tmp_path))
               for name, row in rows.items()}  # fmt: skip
    for name, one in configs.items():
        assert one.run.modes[0] == "train" and one.data.seed == 7, name
        assert one.run.start == "continue" and one.run.output == tmp_path / "run"
        assert one.training.epochs == settings.epochs
    if experiment == "criteria":
        shared = [(c.training, c.augment, c.data, c.network) for c in configs.values()]
        assert all(one == shared[0] for one in shared)
        assert [one.loss.ghm_loss for one in configs.values()].count(True) == 1
    if experiment == "augment":
        policies = {name: one.augment.aug_policy for name, one in configs.items()}
        assert policies["-aug"] is None and policies["baseline (bce+aug)"] == "my"
        assert policies["AutoAugment for MyAugment"] == "imagenet"
        assert configs["+multi-scale"].augment.multi_scale and configs["+mixup"].augment.mixup
        assert configs["+distill from b0+ghm"].teaching.distill
    if experiment == "distill":
        assert configs["teacher: larger net"].network.arch == settings.larger


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


def test_pretrained_is_taken_out_of_its_row():
    rows = {row.name: row for row in EXPERIMENTS["augment"]}
    extra = ["--init", "w.pth"]
    whole, without = (
        words_of_row(rows[name], recipe("full", "augment"), extra)
        for name in ("baseline (bce+aug)", "-pretrained")
    )
    assert "w.pth" in whole and set(whole) ^ set(without) == {"w.pth", "none"}
    reason = rows["-pretrained"].reason
    assert reason("full", "none") and not reason("full", "w")


def test_the_record_s_rows_are_those_by_hand():
    def cell(value):
        return {"accuracy": value, "macro_f1": 0.5, "val_accuracy": 0.5, "seconds": 1.0,
                "best_epoch": 2, "parameters": 10}  # fmt: skip

    values = {"a": [0.5, 0.6, 0.7], "b": [0.6, 0.6, 0.9]}
    results = {
        (name, n): cell(value) for name, row in values.items() for n, value in enumerate(row)
    }
    trials = Trials(tuple(Cell(*key[:1], {}, key[1]) for key in results), results, 6.0)
    rows = [Row("a"), Row("b", published=0.89), Row("c")]
    found = summarize_rows(rows, trials, {"c": "too large"})
    assert found["a"]["accuracy"] == pytest.approx({"mean": 0.6, "std": 0.1, "n": 3})
    assert found["a"]["values"] == values["a"] and found["b"]["published"] == 0.89
    gap = found["b"]["difference"]
    differences = np.array([0.1, 0.0, 0.2])
    assert gap["mean"] == pytest.approx(0.1) and gap["wins"] == 2 and gap["to"] == "a"
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
    assert not list((out / "cells").rglob("checkpoints"))  # what is large is taken away
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("softmax-*/cell.json")]
    assert sorted(one["result"]["accuracy"] for one in cells) == sorted(rows["softmax"]["values"])
    again = zoo_reproduce("criteria", "--scale", "rehearsal", "--output", out)
    assert again.code == 1 and "already holds a run" in again.err
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
    saved, count = Training._save, []

    def save(self):
        saved(self)
        count.append(self.epoch)
        if len(count) == 3:  # the second cell, after its first epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_save", save)
    stopped = zoo_reproduce(*words, "--output", tmp_path / "stopped")
    assert stopped.code == 130
    monkeypatch.setattr(Training, "_save", saved)
    done = zoo_reproduce(*words, "--output", tmp_path / "stopped", "--continue")
    assert done.code == 0, done.err
    log = tmp_path / "stopped" / "cells" / "bce-loss-s0" / "run" / "log.txt"
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
    folder = out / "cells" / "from-it--averaged-with-the-labels-s0" / "run" / "files"
    teacher = read_sample_file(folder / "distill_0.txt")
    labels = read_sample_file(folder / "distill_1.txt")
    assert set(np.unique(labels.values)) == {0.0, 1.0}
    assert teacher.names == labels.names and teacher.about["what"] == "teacher"


def test_the_control_has_the_same_weights_on_other_images(tmp_path):
    names = [f"train/a/{n}.jpg" for n in range(30)]
    weights = np.linspace(0.1, 1, 30)[:, None]
    rows = {row.name: row for row in EXPERIMENTS["curriculum"]}
    bench, settings = Bench(tmp_path, None, rows), recipe("rehearsal", "curriculum")
    source = tmp_path / "cells" / "no-curriculum-s3" / "run" / "files"
    write_sample_file(source / "curriculum.txt", names, weights, about={})
    found = {}
    for name in ("its weights dealt out at random", "curriculum of that run"):
        cell = cell_of(rows[name], 3, settings)
        assert cell.needs == ("no curriculum",)
        words = bench.command(cell, tmp_path / name)
        found[name] = read_sample_file(Path(words[words.index("--knowledge_dir") + 1])
                                       / "curriculum.txt")  # fmt: skip
    dealt, kept = found.values()
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

    settings = replace(recipe("short", "criteria"), cache_side=64)
    data = open_images(zoo_data, tmp_path, known=False, settings=settings)
    assert data.kind == "real" and (tmp_path / "cache" / "pixels.bin").exists()
    settings = replace(settings, cache_side=0)
    plain = open_images(zoo_data, tmp_path / "p", known=False, settings=settings)
    for split in ("train", "test"):
        mine, theirs = data.image_set(split), plain.image_set(split)
        for n in range(len(mine)):
            np.testing.assert_array_equal(mine.image(n), theirs.image(n))
        assert mine.paths == theirs.paths
    shutil.rmtree(tmp_path / "cache")


def test_the_scale_follows_the_data(monkeypatch, zoo_reproduce, zoo_data, tmp_path):
    seen = []

    def stop(asked, run, rows, reasons, settings, data):
        seen.append((data.kind, json.loads((run.folder / "config.json").read_text())))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run_cells", stop)
    zoo_reproduce("criteria", "--data-path", zoo_data, "--output", tmp_path / "a")
    zoo_reproduce("criteria", "--data-root", tmp_path / "none", "--output", tmp_path / "b")
    assert [(kind, config["scale"]) for kind, config in seen] == [
        ("real", "full"), ("built-in", "rehearsal"),
    ]  # fmt: skip
    assert seen[0][1]["recipe"]["arch"] == "efficientnet_b0"
    assert Path(seen[0][1]["data"]) == zoo_data


def test_two_shards_do_every_cell_once_and_the_second_writes_the_page(
    tiny, zoo_reproduce, tmp_path
):
    """As a job array of a cluster does, in one folder; a teacher goes with its student."""
    words = ["distill", "--scale", "rehearsal", "--seeds", 0, "--output", tmp_path,
             "--rows", "alone", "from the same net, ghm"]  # fmt: skip
    first = zoo_reproduce(*words, "--shard", "1/2")
    assert first.code == 0 and not (tmp_path / "result.json").exists(), first.err
    done = {path.parent.name for path in (tmp_path / "cells").glob("*/cell.json")}
    assert done in ({"alone-s0"}, {"teacher--same-net--ghm-s0", "from-the-same-net--ghm-s0"})
    second = zoo_reproduce(*words, "--shard", "2/2")
    assert second.code == 0, second.err
    assert len(read_result(tmp_path / "result.json")["measured"]["rows"]) == 3


def test_a_cell_of_other_settings_is_refused(tiny, zoo_reproduce, tmp_path):
    words = ["criteria", "--scale", "rehearsal", "--seeds", 0, "--output", tmp_path,
             "--rows", "softmax"]  # fmt: skip
    assert zoo_reproduce(*words).code == 0
    done = zoo_reproduce(*words, "--continue", "--threads", 2)
    assert done.code == 1 and "was made with words=" in done.err


@pytest.mark.parametrize(
    ("ends", "trained", "words"),
    [
        ((0.01, 0.03), 0.7, ("BELOW trained features, linear (0.7000)", ") helped: +2.0 points")),
        ((-0.01, 0.05), 0.5, ("above trained features", "did not help for sure: +2.0")),
        ((-0.03, -0.01), None, ("equal to the best floor without", "did not help, it hurt: +2.0")),
    ],
)
def test_what_came_of_it_is_said_in_whole_sentences(ends, trained, words):
    rows = [Row("alone", ()), Row("taught", ("--distill",)), Row("not run", ())]
    gap = {"mean": 0.02, "low": ends[0], "high": ends[1], "n": 3}
    table = {
        "alone": {"accuracy": {"mean": 0.58}},
        "taught": {"accuracy": {"mean": 0.6}, "difference": gap},
        "not run": {"not_run": "too long"},
    }
    floors = {"plain": 0.3, "engineered": 0.6}
    floors |= {} if trained is None else {"trained features, linear": {"accuracy": trained}}
    said = verdicts(rows, table, floors)
    assert len(said) == 2 and said[0].startswith("0.6000 on test (taught, the best row)")
    assert all(word in line for word, line in zip(words, said, strict=True))
