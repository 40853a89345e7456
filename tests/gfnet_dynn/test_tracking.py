"""MLflow on an sqlite store, seen through its own client; and training without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gfnet_dynn.tracking import Tracker
from shared_core.runs import read_metrics


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny, command):
    """A run stopped after the backbone, gone on with, and one that failed; all in one store."""
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    runs = tmp_path_factory.mktemp("space ü") / "runs"
    folder = runs / "gfnet_dynn" / "first"
    words = [word for word in tiny(folder) if word not in ("--use_mlflow", "false")]
    for more in (("--stage", "prepare"), ("--stage", "backbone"), ("--resume",)):
        done = command(*words, *more)
        assert done.code == 0, done.err
    failed = [*words, "--output", str(runs / "second"), "--backbone-lr", "1e30"]
    assert command(*failed, "--clip-grad", "0").code == 1
    return MlflowClient(f"sqlite:///{runs / 'mlflow.db'}"), folder


def the_runs(client):
    experiment = client.get_experiment_by_name("gfnet_dynn-AID")
    return {run.info.status: run for run in client.search_runs([experiment.experiment_id])}


def test_one_run_however_often_it_is_resumed(tracked):
    client, folder = tracked
    runs = the_runs(client)
    assert sorted(runs) == ["FAILED", "FINISHED"]  # one each
    run = runs["FINISHED"]
    assert run.info.run_id == json.loads((folder / "mlflow-run.json").read_text())["run_id"]
    assert run.info.run_name == "0.75_boosted_rehearsal"


def test_parameters_and_artifacts(tracked):
    client, folder = tracked
    run = the_runs(client)["FINISHED"]
    wanted = {"lr": "0.02", "ce_ic_tradeoff": "0.75", "exits": "[0, 1, 2]", "scale": "rehearsal"}
    assert wanted.items() <= run.data.params.items()
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    (model,) = (folder / "checkpoint/best").glob("*.pth")
    assert {"result.json", "report.md", "report.html", model.name} <= names
    kept = Path(client.download_artifacts(run.info.run_id, model.name))
    assert kept.read_bytes() == model.read_bytes()
    stored = Path(client.download_artifacts(run.info.run_id, "result.json"))
    assert stored.read_bytes() == (folder / "result.json").read_bytes()


def test_metrics_are_those_of_the_log_under_the_original_names(tracked):
    client, folder = tracked
    run = the_runs(client)["FINISHED"]
    named = {f"val/{name}{e}" for e in (0, 1, 2) for name in ("acc", "ece", "percent_exit")}
    named |= {f"{s}/{n}{e}" for s in ("train", "val") for e in (0, 1, 2) for n in ("p_max",)}
    named |= {"val/gated_acc", "val/test_acc", "val/total_cost", "val/acc_final", "train/loss"}
    assert named <= run.data.metrics.keys()
    for line in read_metrics(folder / "metrics.jsonl"):
        prefix = line["split"] if line["stage"] == "exits" else f"{line['stage']}/{line['split']}"
        key, name = ("val/gated_acc", "gated_acc"), "gated_acc"
        name = "gated_acc" if line["stage"] == "exits" else "acc" if "acc" in line else "loss"
        key = f"{prefix}/{name}"
        history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}
        assert history[line["step"]] == pytest.approx(line[name])
    history = client.get_metric_history(run.info.run_id, "val/acc_final")
    assert [metric.step for metric in history] == [0, 1, 2, 3]


def test_without_mlflow_installed(tmp_path, tiny, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    words = [*tiny(tmp_path / "run"), "--use_mlflow", "true", "--stage", "prepare"]
    done = command(*words)
    assert done.code == 0
    assert done.err.count("mlflow is not installed") == 1
    assert not (tmp_path / "mlflow.db").exists()


def test_switched_off_it_is_not_even_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracker = Tracker(tmp_path, experiment="x", run_name="y", enabled=False)
    tracker.parameters({"a": 1})
    tracker.metrics({"b": 1.0}, step=0)
    tracker.artifact(tmp_path)
    tracker.close()
    assert tracker.run_id is None and not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


class BrokenStore:
    """An mlflow whose disk is full."""

    def __getattr__(self, name):
        def call(*words, **more):
            raise RuntimeError("database or disk is full")

        return call


def test_a_store_that_fails_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", BrokenStore())
    tracker = Tracker(tmp_path, experiment="x", run_name="y")
    tracker.metrics({"b": 1.0}, step=0)
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "disk is full" in said and "metrics.jsonl" in said
