"""Trials of the claims on a tiny run: the grid, its numbers by hand, going on after a stop."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from gfnet_dynn.judge.claims import settings_of
from gfnet_dynn.model_files import load_model
from gfnet_dynn.report.claims_page import summarise_claims
from shared_core.runs import UsageError, read_result, run_command


@pytest.fixture(scope="module")
def tried(tmp_path_factory, finished, capture):
    folder = tmp_path_factory.mktemp("claims") / "out"
    words = (finished[0], folder, "--seeds", 0, 1, "--tradeoffs", 0, 5)
    return folder, words, capture(*words)


@pytest.fixture(scope="module")
def capture():
    import contextlib
    import io

    from gfnet_dynn import claims

    def call(*words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run_command(claims.main, [str(word) for word in words])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    return call


def test_grid_is_run_recorded_and_reported(tried, finished):
    folder, _, (code, out, err) = tried
    assert code == 0, err
    record = read_result(folder / "result.json")
    measured = record["measured"]
    assert record["task"] == "gfnet_dynn/aid-claims" and record["seeds"] == [0, 1]
    assert set(measured["settings"]) == {"lambda-0", "lambda-5", "few-exits", "all-exits"}
    assert measured["varied_by_seed"] == "exits; backbone and student are one"
    # One student under all of them; the seeds differ in the exits.
    student = (finished[0] / "checkpoint/student_built-in-scenes.pth").read_bytes()
    for cell in folder.glob("cells/*/run/checkpoint/student_built-in-scenes.pth"):
        assert cell.read_bytes() == student
    rows = {
        (row["name"], row["seed"]): row["result"]
        for row in (json.loads(p.read_text()) for p in folder.glob("cells/*/cell.json"))
    }
    assert len(rows) == 8
    finals = {row["final_accuracy"] for row in rows.values()}
    assert len(finals) == 1  # frozen below the exits
    assert rows["exits all lambda 0.75", 0]["exits"] == [0, 1, 2]
    # The mean of the record is that of the cells, the deviation is the sample's.
    values = [rows["exits 0.1.2 lambda 5", s]["fixed"]["accuracy"] for s in (0, 1)]
    found = measured["settings"]["lambda-5"]["fixed"]["accuracy"]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1)) and found["n"] == 2
    # Dearer computing leaves earlier.
    cost = [measured["settings"][f"lambda-{v}"]["fixed"]["macs_fraction"]["mean"] for v in (0, 5)]
    assert cost[1] <= cost[0]
    assert "claims.png" in (folder / "report.md").read_text()
    assert "REHEARSAL" in (folder / "report.md").read_text()
    assert "few exits" in out and "report: " in out


def test_goes_on_where_it_stopped(tried, capture, tmp_path, without_times):
    folder, words, _ = tried
    before = read_result(folder / "result.json")["measured"]
    cells = sorted(folder.glob("cells/*/cell.json"))
    stamps = {cell: cell.stat().st_mtime_ns for cell in cells[1:]}
    lost = json.loads(cells[0].read_text())
    cells[0].unlink()
    assert capture(*words)[0] == 0
    assert {cell: cell.stat().st_mtime_ns for cell in cells[1:]} == stamps  # not run again
    again = json.loads(cells[0].read_text())

    def accuracies(row):
        return [row["result"][key] for key in ("fixed", "budgets", "final_accuracy")]

    assert accuracies(again) == accuracies(lost)
    after = read_result(folder / "result.json")["measured"]
    assert after["settings"]["lambda-5"]["fixed"] == before["settings"]["lambda-5"]["fixed"]


def test_a_replayed_cell_is_the_one_that_is_trained_on_images(tried, capture):
    """all-exits came last, on embeddings that another cell had recorded; alone it sees images."""
    folder, words, _ = tried
    cell = folder / "cells" / "exits-all-lambda-0.75-s1"
    place = cell / "run"

    def left() -> tuple[bytes, dict]:
        (model,) = (place / "checkpoint/best").glob("*.pth")
        return (place / "metrics.jsonl").read_bytes(), load_model(model)[0].state_dict()

    log, weights = left()
    shutil.rmtree(cell)
    assert capture(*words)[0] == 0
    again, found = left()
    assert again == log
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_distilled_against_scratch_and_own_students(finished, capture, tmp_path):
    words = (finished[0], tmp_path / "out", "--what", "distil", "exits", "--vary", "student")
    code, out, err = capture(*words, "--seeds", 3, 4)
    assert code == 0, err
    record = read_result(tmp_path / "out/result.json")
    assert record["measured"]["varied_by_seed"].startswith("student and exits")
    claim = record["measured"]["claims"]["distilled beats from scratch"]
    place = tmp_path / "out/cells"
    rows = [
        [
            json.loads((place / f"student-{name}-s{s}/cell.json").read_text())["result"]["student"]
            for s in (3, 4)
        ]
        for name in ("distilled", "from-scratch")
    ]
    gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(*rows, strict=True)]
    assert claim["distilled_minus_scratch"]["mean"] == pytest.approx(np.mean(gaps))
    files = {
        (s, name): (place / f"{name}-s{s}/run/checkpoint/student_built-in-scenes.pth").read_bytes()
        for s in (3, 4)
        for name in ("student-distilled", "student-from-scratch", "exits-0.1.2-lambda-0.75")
    }
    distilled, scratch = "student-distilled", "student-from-scratch"
    assert files[3, distilled] != files[4, distilled] != files[4, scratch]
    # Settings that train it alike share it.
    assert files[3, "exits-0.1.2-lambda-0.75"] == files[3, distilled]


def row_of(accuracy, cost, *, few=0.6, final=0.7):
    point = {"accuracy": accuracy, "macs_fraction": cost}
    speed = {"batch 1": 1.25, "batch 64": 1.5}
    return {
        "exits": [1],
        "policy": "gate",
        "final_accuracy": final,
        "fixed": point,
        "points": {"balanced": {**point, "speed_up": speed}},
        "budgets": {"0.7": {"accuracy": few, "macs_fraction": 0.69}},
    }


def test_claims_by_hand():
    rows = {
        "lambda-10": [row_of(0.4, 0.3), row_of(0.5, 0.3)],
        "lambda-2": [row_of(0.6, 0.5), row_of(0.55, 0.5)],
        "few-exits": [row_of(0.65, 0.5, few=0.66), row_of(0.65, 0.8, few=0.64)],
        "all-exits": [row_of(0.6, 0.5, few=0.63), row_of(0.6, 0.5, few=0.65)],
    }
    claims = summarise_claims(rows)["claims"]
    falls = claims["accuracy falls as lambda grows"]  # in the order of numbers, not of words
    assert falls["holds_in_the_mean"] and falls["holds_for_every_seed"]
    assert falls["last_against_first"]["mean"] == pytest.approx((-0.2 - 0.05) / 2)
    few = claims["few exits beat all exits"]
    assert few["few_minus_all"]["mean"] == pytest.approx((0.03 - 0.01) / 2)
    assert few["few_minus_all"]["wins"] == 1 and few["holds_in_the_mean"]
    speed = claims["early exit is faster"]
    assert speed["macs"]["mean"] == pytest.approx((1 / 0.5 + 1 / 0.8) / 2)
    assert speed["time"]["batch 64"]["mean"] == 1.5
    assert speed["accuracy_against_final_head"]["mean"] == pytest.approx(-0.05)
    rows["lambda-2"][1]["fixed"]["accuracy"] = 0.45  # one seed rises, the mean still falls
    falls = summarise_claims(rows)["claims"]["accuracy falls as lambda grows"]
    assert falls["holds_in_the_mean"] and not falls["holds_for_every_seed"]
    rows["few-exits"][0]["budgets"] = {"0.9": {"accuracy": 0.6, "macs_fraction": 0.8}}
    found = summarise_claims(rows)  # too dear for the budget: nothing to compare
    assert "few exits beat all exits" not in found["claims"]
    assert found["settings"]["few-exits"]["budgets"] == {}


def test_equal_settings_are_run_once_whatever_was_asked_first(
    finished, capture, tmp_path, monkeypatch
):
    from gfnet_dynn.judge import claims

    ran = []
    train = claims.train_exits
    monkeypatch.setattr(
        claims, "train_exits", lambda run, replay: ran.append(run) or train(run, replay)
    )
    words = (finished[0], tmp_path / "out", "--seeds", 0, "--tradeoffs", 0.75)
    code, out, err = capture(*words, "--what", "exits", "--shard", "1/2")
    assert code == 0 and "1 of 2 trials are not done here" in out, err
    assert not (tmp_path / "out/result.json").exists()
    assert capture(*words, "--what", "exits", "--shard", "2/2")[0] == 0
    assert len(ran) == 2 and (tmp_path / "out/result.json").exists()
    code, _, err = capture(*words)  # the run's own lambda is 0.75: its cell is there
    assert code == 0, err
    settings = read_result(tmp_path / "out/result.json")["measured"]["settings"]
    assert len(ran) == 2 and settings["lambda-0.75"] == settings["few-exits"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--seeds", 1, 1), 2, "expected different numbers"),
        (("--tradeoffs", "-1"), 2, "expected"),
        (("--what", "magic"), 2, "invalid choice"),
    ],
)
def test_wrong_words(finished, capture, tmp_path, words, code, says):
    got, _, err = capture(finished[0], tmp_path / "out", *words)
    assert got == code and says in err and not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(finished, capture, tmp_path):
    code, _, err = capture(tmp_path, tmp_path / "out")
    assert code == 1 and "holds no run" in err
    code, _, err = capture(finished[0], finished[0])
    assert code == 2 and "is the run itself" in err


def test_a_run_with_exits_everywhere_has_no_few():
    with pytest.raises(UsageError, match="has an exit after every block"):
        settings_of(["exits"], [], {"exits": "all"})
