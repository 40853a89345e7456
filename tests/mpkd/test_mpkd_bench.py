"""The benchmark of mpkd: what it compares, what it skips and says, and when it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    added = [str(REPO / "tools"), str(REPO / "tools" / "bench")]
    sys.path += added  # behind the packages: a script there has mpkd's name
    spec = importlib.util.spec_from_file_location("bench_mpkd", REPO / "tools/bench/mpkd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for path in added:
        sys.path.remove(path)


class Fake:
    """A training whose losses are given."""

    def __init__(self, losses):
        self.losses = itertools.cycle(losses)

    def step(self):
        return next(self.losses)


def fake_ways(monkeypatch, bench, losses, *, openvino=True):
    asked = {}

    def trainings(_folder, ways, *, count):
        asked.update(ways)
        return {name: Fake(losses.get(name, [0.5, 0.25])) for name in ways}

    monkeypatch.setattr(bench, "trainings", trainings)
    monkeypatch.setattr(bench, "find_spec", lambda _name: object() if openvino else None)
    return asked


def test_what_a_processor_without_bf16_gets(monkeypatch, bench, tmp_path):
    reason = bench.missing_bf16(["avx2", "avx512f", "avx512_vnni"])
    assert "neither avx512_bf16 nor amx_bf16" in reason
    assert bench.missing_bf16(["avx2", "amx_bf16"]) is bench.missing_bf16(["avx512_bf16"]) is None
    asked = fake_ways(monkeypatch, bench, {"live": [0.5, 0.25 * (1 + 9e-6)]})
    rows = bench.compare_steps(tmp_path, 3, checked=2, bf16=reason)
    assert asked["as written"] == {"distillation.cache_teacher_logits": False}
    assert asked["live"]["distillation.teacher_engine"] == "openvino" and "live bf16" not in asked
    stored, live_bf16, live = rows
    assert stored["goal"] == 20 and stored["skipped"] is None and "within 0e+00" in stored["equal"]
    assert live_bf16["goal"] == 2.4 and live_bf16["skipped"] == reason
    assert live["goal"] is None and live["met"] is None and "within 9e-06" in live["equal"]


def test_what_a_processor_with_bf16_gets_and_without_openvino(monkeypatch, bench, tmp_path):
    asked = fake_ways(monkeypatch, bench, {"live bf16": [0.51, 0.25]})
    rows = bench.compare_steps(tmp_path, 2, checked=2, bf16=None)
    assert asked["live bf16"]["mixed_precision.enabled"] is True
    assert [row["goal"] for row in rows] == [20, None, 2.4]
    assert not any(row["skipped"] for row in rows) and "2e-02" in rows[2]["equal"]
    fake_ways(monkeypatch, bench, {}, openvino=False)
    rows = bench.compare_steps(tmp_path, 2, checked=2, bf16=None)
    assert rows[2]["skipped"] == "openvino is not installed" and rows[0]["skipped"] is None


def test_unequal_losses_are_no_record(monkeypatch, bench, tmp_path):
    fake_ways(monkeypatch, bench, {"stored": [0.5, 0.25 * (1 + 3e-5)]})
    with pytest.raises(ValueError, match="stored: a loss differs by 3.0e-05"):
        bench.compare_steps(tmp_path, 2, checked=2, bf16="none")


def test_lines_are_medians_of_pairs_and_pass_the_records_check(bench):
    import ledger_records

    rows = [
        bench.row("a", [0.001, 0.002, 0.004], [0.004, 0.004, 0.004], goal=2.5, equal="same"),
        bench.share("b", 0.985, goal=0.99, equal="200 images"),
        bench.skipped("c", 4.5, "nncf is not installed"),
    ]
    assert (rows[0]["ratio_min"], rows[0]["ratio_median"], rows[0]["ratio_max"]) == (1, 2, 4)
    assert rows[0]["ours"] == 2 and rows[0]["theirs"] == 4 and rows[0]["met"] is False
    assert rows[1]["ratio_median"] == 0.985 and rows[1]["met"] is False
    record = {"topic": "mpkd", "date": "2026-01-01", "environment": {}, "rows": rows}
    ledger_records.check_benchmark(json.loads(json.dumps(record)), "mpkd")


def test_patterns_and_statistics(bench):
    steps = sys.modules["_mpkd_steps"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    made = steps.tiled(pixels, 2)
    assert made.shape == (3, 8, 8, 3) and steps.normal(made).shape == (3, 3, 8, 8)
    assert all((made[:, a:, b:][:, :4, :4] == pixels).all() for a in (0, 4) for b in (0, 4))
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    images = torch.randn(64, 3, 5, 5) * 3 + 1
    steps.settled(net, images)
    halves = images.double().numpy().reshape(2, 32, 3, 25)
    assert np.allclose(net[0].running_mean, halves.mean(axis=(0, 1, 3)), atol=1e-5)
    assert np.allclose(net[0].running_var, np.mean([h.transpose(1, 0, 2).reshape(3, -1).var(
        axis=1, ddof=1) for h in halves], axis=0), rtol=1e-4)  # fmt: skip
    assert net[0].momentum == 0.1 and not net.training
