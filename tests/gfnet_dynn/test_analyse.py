"""analyse.py's numbers against loops over samples, scipy and tables made by hand."""

import io
import itertools
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import binom

from gfnet_dynn import analyse
from gfnet_dynn.decide import findings as analysis
from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.decide.placement import exit_overheads, pruned_costs
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from shared_core import checkpoints
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.runs import run_command

G, K = 2, 4
NAMES = ("analysis.html", "analysis.json", "analysis.md")
PLOTS = ("budgets.png", "conformal.png", "risk.png", "rules.png")


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_command(analyse.main, [str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = GFNet(img_size=16, patch_size=4, num_classes=K, embed_dim=8, depth=4)
    return GFNetDynn(backbone, (0, 2)).eval()


def make(model, split, n, seed):
    """Exits that get better with depth; sure where they are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n)
    hard = rng.uniform(0, 1, n)
    logits = rng.normal(0, 1, (G + 1, n, K))
    for e in range(G + 1):
        logits[e, np.arange(n), labels] += (1.2 + 1.3 * e) * (1.6 - hard)
    gates = (2 - 4 * hard)[:, None] + rng.normal(0, 0.7, (n, G))
    return ExitLogits(
        logits.astype(np.float32),
        gates.astype(np.float32),
        labels,
        model.exit_costs(),
        model.exits,
        split,
        "c" * 64,
    )


@pytest.fixture(scope="module")
def outputs(model):
    return make(model, "calibration", 121, 1), make(model, "test", 150, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, outputs):
    folder = tmp_path_factory.mktemp("a run")
    for found in outputs:
        found.save(folder / f"outputs-{found.split}.npz")
    (folder / "result.json").write_text(json.dumps({"measured": {"exits": {"policy": "margin"}}}))
    facts = checkpoints.make_facts(
        project="gfnet_dynn",
        architecture="GFNetDynn",
        class_names=list("abcd"),
        framework="torch",
        model=model.config(),
    )
    (folder / "checkpoint" / "best").mkdir(parents=True)
    save_checkpoint(folder / "checkpoint" / "best" / "m.pth", model.state_dict(), facts)
    return folder


@pytest.fixture(scope="module")
def done(run):
    words = ("--max-accuracy-loss", "0.04", "--budgets", "0.9", "0.2", "0.6", "--alpha", "0.2")
    code, out, err = call(run, *words)
    assert code == 0, err
    return json.loads((run / "analysis" / "analysis.json").read_text()), out


def margins(found, temperatures):
    p = softmax(found.logits.astype(np.float64) / np.array(temperatures)[:, None, None], axis=2)
    p.sort(axis=2)
    return (p[..., -1] - p[..., -2])[:G].T  # (N, G)


def leave(scores, threshold):
    return np.array([next((e for e in range(G) if row[e] >= threshold), G) for row in scores])


def right(found, left):
    return np.array([found.logits[e, n].argmax() == found.labels[n] for n, e in enumerate(left)])


def test_files_and_summary(run, done):
    result, out = done
    assert sorted(path.name for path in (run / "analysis").iterdir()) == sorted((*NAMES, *PLOTS))
    page = (run / "analysis" / "analysis.html").read_text()
    markdown = (run / "analysis" / "analysis.md").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert all(f"]({name})" in markdown for name in PLOTS)
    assert result["kind"] == "margin"  # the run's own
    assert result["settings"]["budgets"] == [0.2, 0.6, 0.9]
    assert out.strip().endswith("analysis.html") and "margin, used: balanced" in out
    assert "budget 20.0 %, margin: not even leaving at the first exit is that cheap" in out


def test_sweeps_equal_loops(done, outputs):
    result, _ = done
    temperatures = [row["temperature"] for row in result["exits"]]
    for name, found in zip(("calibration_", ""), outputs, strict=True):
        scores = margins(found, temperatures)
        for row in result["sweeps"]["margin"]:
            left = leave(scores, row["threshold"])
            assert row[f"{name}accuracy"] == pytest.approx(right(found, left).mean(), abs=1e-9)
            assert row[f"{name}cost"] == pytest.approx(found.costs[left].mean())
    assert [row["threshold"] for row in result["sweeps"]["patience"]] == [0, 1, 2]
    assert set(result["sweeps"]) == {"gate", "jei", "max_prob", "entropy", "margin", "patience"}
    gates = 1 / (1 + np.exp(-outputs[1].gate_logits.astype(np.float64)))
    for row in result["sweeps"]["gate"]:
        left = leave(gates, row["threshold"])
        assert row["rates"] == pytest.approx(np.bincount(left, minlength=G + 1) / 150)


def test_each_exit_alone(done, outputs):
    for e, row in enumerate(done[0]["exits"]):
        for found in outputs:
            expected = (found.logits[e].argmax(1) == found.labels).mean()
            assert row[f"{found.split}_accuracy"] == pytest.approx(expected)


def test_wishes_and_budgets_equal_a_search_of_all_thresholds(done, outputs):
    result, _ = done
    calibration, test = outputs
    temperatures = [row["temperature"] for row in result["exits"]]
    scores = margins(calibration, temperatures)
    tried = []
    for threshold in [*np.unique(scores), 9.0]:
        left = leave(scores, threshold)
        tried.append((calibration.costs[left].mean(), right(calibration, left).mean()))
    final = (calibration.logits[-1].argmax(1) == calibration.labels).mean()
    for name, least in (("careful", final), ("balanced", final - 0.04)):
        cheapest = min(cost for cost, accuracy in tried if accuracy >= least - 1e-12)
        row = result["wishes"]["margin"][name]
        assert row["calibration"]["cost"] == pytest.approx(cheapest)
        left = leave(margins(test, temperatures), row["threshold"] - 1e-7)
        assert row["test"]["accuracy"] == pytest.approx(right(test, left).mean(), abs=0.007)
    rows = {row["budget"]: row for row in result["budgets"] if row["kind"] == "margin"}
    assert rows[0.2]["threshold"] is None
    for share in (0.6, 0.9):
        allowed = share * calibration.costs[-1]
        dearest = max(cost for cost, _ in tried if cost <= allowed)
        assert rows[share]["calibration"]["cost"] == pytest.approx(dearest)


def test_budgeted_batch_lets_the_planned_shares_leave(done, outputs):
    rows = done[0]["budgeted_batch"]["margin"]
    assert len(rows) == 39 and [rows[0]["q"], rows[-1]["q"]] == [0.05, 1.95]
    calibration = outputs[0]
    scores = margins(calibration, [row["temperature"] for row in done[0]["exits"]])
    middle = rows[19]  # q = 1: a third each
    left = [
        next((e for e in range(G) if row[e] >= middle["thresholds"][e] - 1e-7), G) for row in scores
    ]
    assert np.bincount(left).tolist() == [40, 40, 41]


def test_conformal_sets_by_hand(done, outputs):
    calibration, test = outputs
    order = np.random.default_rng(0).permutation(121)
    halves = analysis.halves(calibration)
    assert np.array_equal(halves[0].labels, calibration.labels[order[:60]])
    assert np.array_equal(halves[1].labels, calibration.labels[order[60:]])
    policy = analysis.three_policies(
        analysis.policies_of(halves[0], ["margin"])["margin"], halves[0], max_loss=0.04
    )["balanced"]
    chosen = []
    for found in (halves[1], test):
        t = np.array(policy.temperatures)[:, None, None]
        p = softmax(found.logits.astype(np.float64) / t, axis=2)
        left = leave(margins(found, policy.temperatures), policy.thresholds[0] - 1e-7)
        chosen.append((p[left, np.arange(len(left))], found.labels))
    (p, labels), (q, truth) = chosen
    scores = np.sort(1 - p[np.arange(len(labels)), labels])
    limit = scores[math.ceil((len(scores) + 1) * 0.8) - 1]
    members = 1 - q <= limit
    row = next(row for row in done[0]["conformal"] if row["family"] == "general")
    assert row["alpha"] == 0.2
    assert row["quantiles"][0] == pytest.approx(limit, abs=1e-6)
    assert row["mean_set_size"] == pytest.approx(members.sum(1).mean(), abs=0.02)
    assert row["coverage"] == pytest.approx(members[np.arange(150), truth].mean(), abs=0.01)
    assert len(done[0]["conformal"]) == 2


def test_risk_by_the_binomial_distribution(done, outputs):
    calibration, test = outputs
    rows = {(row["kind"], row["level"]): row for row in done[0]["risk"]}
    assert sorted({level for _, level in rows}) == [0.04, 0.08, 0.2]
    assert {kind for kind, _ in rows} == set(done[0]["sweeps"])

    def losses(found, threshold):
        left = leave(margins(found, [1, 1, 1]), threshold)
        full = found.logits[-1].argmax(1) == found.labels
        return int((full & ~right(found, left)).sum())

    for level in (0.04, 0.08, 0.2):
        threshold = None
        for candidate in np.linspace(0, 1, 201)[::-1]:
            if binom.cdf(losses(calibration, candidate), 121, level) > 0.1:
                break
            threshold = candidate
        row = rows["margin", level]
        assert row["threshold"] == pytest.approx(threshold) and row["risk"] == "regret"
        assert row["test_risk"] == pytest.approx(losses(test, threshold) / 150)
    assert rows["patience", 0.2]["threshold"] in (0, 1, 3)
    for level, confidence in ((0.01, 0.9), (0.05, 0.95), (0.5, 0.75)):
        n = analysis.samples_needed(level, confidence)
        assert binom.cdf(0, n, level) <= 1 - confidence + 1e-12
        assert binom.cdf(0, n - 1, level) > 1 - confidence


def test_placement_is_the_best_of_all_subsets(done, outputs, model):
    calibration = outputs[0]
    temperatures = [row["temperature"] for row in done[0]["exits"]]
    scores, overheads = margins(calibration, temperatures), exit_overheads(model)
    rows = {(r["budget"], r["max_exits"]): r for r in done[0]["placement"]}
    assert set(rows) == {(b, m) for b in (0.2, 0.6, 0.9) for m in (1, 2)}
    for (share, most), row in rows.items():
        best = None
        for size in range(most + 1):
            for kept in itertools.combinations(range(G), size):
                costs = pruned_costs(calibration.costs, overheads, kept)
                for t in [*np.unique(scores), 9.0]:
                    left = [
                        next((i for i, e in enumerate(kept) if s[e] >= t), size) for s in scores
                    ]
                    exits = np.array([*kept, G])[left]
                    cost = costs[left].mean()
                    if cost <= share * calibration.costs[-1]:
                        rank = (right(calibration, exits).mean(), -cost)
                        best = max(best or rank, rank)
        if best is None:
            assert row["blocks"] is None
            continue
        assert row["calibration"]["accuracy"] == pytest.approx(best[0])
        assert row["calibration"]["cost"] == pytest.approx(-best[1])
        assert row["calibration"]["cost_fraction"] == pytest.approx(
            -best[1] / calibration.costs[-1]
        )


def test_without_a_model_placement_is_left_out_with_the_reason(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoint")
    (tmp_path / "r" / "result.json").unlink()
    code, out, err = call(tmp_path / "r", "--budgets", "0.7", "--policy", "gate")
    assert code == 0, err
    assert "exits worth keeping: left out" in out and "holds no model" in out
    result = json.loads((tmp_path / "r" / "analysis" / "analysis.json").read_text())
    assert result["placement"] is None and result["kind"] == "gate"
    assert "left out" in (tmp_path / "r" / "analysis" / "analysis.md").read_text()


def test_errors_are_one_line(run, model, outputs, tmp_path):
    code, out, err = call(tmp_path / "no")
    assert code == 1 and "expected a finished run" in err and err.count("\n") == 1
    code, out, err = call(tmp_path)
    assert code == 1 and "holds no outputs-calibration.npz" in err and err.count("\n") == 1
    for option in ("--confidence", "--alpha", "--max-accuracy-loss"):
        code, out, err = call(run, option, "1")
        assert code == 2 and "1: expected [1e-06, 0.999999]" in err
    code, out, err = call(run, "--budgets", "1.2")
    assert code == 2 and "expected (0, 1]" in err
    calibration, test = outputs
    calibration.save(tmp_path / "outputs-calibration.npz")
    other = make(model, "test", 30, 5)
    for wrong, message in (
        (calibration, "same samples"),
        (other.keep([0], costs=other.costs[[0, 2]]), "differ in exits"),
        (ExitLogits(**{**vars_of(other), "split_hash": "d" * 64}), "differ in split_hash"),
        (ExitLogits(**{**vars_of(other), "costs": other.costs + 1}), "differ in costs"),
    ):
        wrong.save(tmp_path / "outputs-test.npz")
        code, out, err = call(tmp_path)
        assert code == 1 and message in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="without exits"):
        analysis.check_pair(*(one.keep([], costs=one.costs[-1:]) for one in outputs))
    (tmp_path / "outputs-test.npz").write_bytes(b"PK broken")
    code, out, err = call(tmp_path)
    assert code == 1 and "no file of exit outputs" in err and err.count("\n") == 1
    assert not (tmp_path / "analysis").exists()


def vars_of(found):
    return {name: getattr(found, name) for name in ExitLogits.__dataclass_fields__}
