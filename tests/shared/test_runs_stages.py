"""Stages of a run: what is done stays done, what was killed begins anew."""

from __future__ import annotations

import torch

from shared_core.for_torch.run_state import Best, StageState
from shared_core.runs import StageLog, read_metrics


def test_finished_stages_are_found_again(tmp_path):
    log = StageLog(tmp_path)
    assert log.done("teach") is None
    log.write("teach", "val", 3, {"accuracy": 0.5})
    log.finish("teach", {"accuracy": 0.5})
    again = StageLog(tmp_path)
    assert again.done("teach")["accuracy"] == 0.5 and again.done("learn") is None


def test_lines_of_a_killed_try_are_dropped(tmp_path):
    log = StageLog(tmp_path)
    log.write("teach", "val", 0, {"accuracy": 0.5})
    log.finish("teach", {})
    log.write("learn", "val", 0, {"accuracy": 0.25})  # and then killed
    again = StageLog(tmp_path)
    again.begin()
    again.write("learn", "val", 0, {"accuracy": 0.75})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["stage"], line["accuracy"]) for line in lines] == [
        ("teach", 0.5),
        ("learn", 0.75),
    ]


def test_state_goes_on_with_the_log_where_it_was_saved(tmp_path):
    net, log = torch.nn.Linear(2, 2), StageLog(tmp_path)
    best = Best()
    assert best.offer(net, 0.5, 1) and not best.offer(net, 0.5, 2)
    state = StageState("learn", {"model": net, "best": best}, log)
    assert not state.restore()
    log.write("learn", "train", 0, {"loss": 2.0})
    state.save(epoch=1)
    log.write("learn", "train", 1, {"loss": 1.0})  # after the last save: lost with the process
    weights = {name: value.clone() for name, value in net.state_dict().items()}

    other, other_best, other_log = torch.nn.Linear(2, 2), Best(), StageLog(tmp_path)
    resumed = StageState("learn", {"model": other, "best": other_best}, other_log)
    assert resumed.restore() and resumed.counters == {"epoch": 1}
    assert all(torch.equal(other.state_dict()[name], value) for name, value in weights.items())
    assert (other_best.accuracy, other_best.epoch) == (0.5, 1)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]
    assert resumed.seconds >= 0
    resumed.remove()
    assert not StageState("learn", {}, other_log).restore()


def test_best_is_a_copy_and_the_first_of_equals():
    net, best = torch.nn.Linear(1, 1), Best()
    best.offer(net, 0.5, 0)
    kept = best.weights["weight"].clone()
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(best.weights["weight"], kept) and not best.offer(net, float("nan"), 1)
