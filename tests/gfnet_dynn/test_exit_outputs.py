"""Outputs of all exits, and what is computed from them, against loops over samples."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from gfnet_dynn.choices import RULES
from gfnet_dynn.decide.exit_outputs import (
    ExitLogits,
    collect,
    exit_metrics,
    exit_rates_per_class,
    summarise,
    take_exit,
)
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy, first_reached
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn


def outputs_of(seed=0, n=60, k=4, gates=3, **options):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(gates + 1, n, k)) * 2
    logits[:, np.arange(n), labels] += 1.5
    return ExitLogits(
        logits.astype(np.float32),
        rng.normal(size=(n, gates)).astype(np.float32),
        labels,
        np.array([100.0, 200.0, 300.0, 450.0])[: gates + 1],
        (1, 2, 4)[:gates],
        **options,
    )


def make_model():
    torch.manual_seed(0)
    backbone = GFNet(
        img_size=16, patch_size=4, num_classes=4, embed_dim=8, depth=4, drop_path_rate=0.5
    )
    model = GFNetDynn(backbone, [0, 1, 2])
    for gate in model.gates:  # gates that tell samples apart
        torch.nn.init.normal_(gate.linear.weight, std=3.0)
    return model


def softmax(z):
    e = np.exp(z.astype(np.float64) - z.max())
    return e / e.sum()


def test_collect_keeps_order_values_and_mode():
    model = make_model().train()
    model.exit_heads.eval()
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10) % 4
    found = collect(
        model, [(images[:7], labels[:7]), (images[7:], labels[7:])], split="test", split_hash="ab"
    )
    assert model.training and model.backbone.training and not model.exit_heads[0].training
    model.eval()
    with torch.no_grad():
        want = model(images)
    np.testing.assert_allclose(found.logits, torch.stack(want.logits), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gate_logits, want.gate_logits, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == labels.tolist()
    assert found.costs.tolist() == model.exit_costs().tolist()
    assert (found.exits, found.split, found.split_hash) == ((0, 1, 2), "test", "ab")
    assert len(collect(model, [(images, labels)] * 3, max_batches=2).labels) == 20
    with pytest.raises(ValueError, match="split 'test' has no batches"):
        collect(model, [], split="test")


@pytest.mark.parametrize("kind", RULES)
def test_the_real_early_exit_leaves_where_the_arrays_say(kind):
    model = make_model().eval()
    images, labels = 3 * torch.randn(24, 3, 16, 16), torch.arange(24) % 4
    outputs = collect(model, [(images, labels)])
    scores = outputs.scores(ExitPolicy(kind))
    policy = ExitPolicy(kind, float(np.median(scores[:, 0])))
    chosen = outputs.select(policy)
    assert len(set(chosen.tolist())) > 1 or kind == "patience"
    assert chosen.tolist() == policy.select(outputs.logits, outputs.gate_logits).tolist()
    real = model.early_exit(images, policy)
    assert real.exit_index.tolist() == chosen.tolist()
    np.testing.assert_allclose(real.logits, take_exit(outputs.logits, chosen), rtol=1e-4, atol=1e-5)


def test_first_reached():
    scores = np.array([[0.1, 0.6, 0.9], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert first_reached(scores, 0.5).tolist() == [1, 0, 3]
    assert first_reached(scores, [0.6, 0.7, 0.0]).tolist() == [2, 2, 2]
    assert first_reached(scores, NEVER).tolist() == [3, 3, 3]
    assert first_reached(scores[:, :0], 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", RULES)
def test_nobody_reaches_the_threshold_of_never(kind):
    outputs = outputs_of()
    policy = ExitPolicy(kind, NEVER)
    assert set(outputs.select(policy).tolist()) == {3}


def test_summary_against_a_loop():
    outputs = outputs_of()
    policy = ExitPolicy("max_prob", [0.8, 0.7, 0.9], temperatures=(1.5, 1.0, 0.8, 2.0))
    exits, right, nll = [], [], []
    for i in range(60):
        probabilities = [
            softmax(outputs.logits[e, i] / t) for e, t in enumerate([1.5, 1.0, 0.8, 2.0])
        ]
        chosen = next((e for e, t in enumerate([0.8, 0.7, 0.9]) if probabilities[e].max() >= t), 3)
        exits.append(chosen)
        right.append(probabilities[chosen].argmax() == outputs.labels[i])
        nll.append(-np.log(probabilities[chosen][outputs.labels[i]]))
    assert set(exits) == {0, 1, 2, 3}
    got = summarise(outputs, policy)
    assert got["accuracy"] == pytest.approx(np.mean(right))
    assert got["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert got["cost"] == pytest.approx(np.mean([outputs.costs[e] for e in exits]))
    assert got["cost_fraction"] == pytest.approx(got["cost"] / 450)
    for e, row in enumerate(got["exits"]):
        here = [r for r, chosen in zip(right, exits, strict=True) if chosen == e]
        assert row["rate"] == pytest.approx(len(here) / 60)
        assert row["accuracy"] == pytest.approx(np.mean(here))
        assert row["block"] == (1, 2, 4, None)[e]
        assert row["accuracy_all"] == pytest.approx(
            (outputs.logits[e].argmax(axis=1) == outputs.labels).mean()
        )


def ece_equal_mass(confidence, right, bins=15):
    """By splitting the sorted samples into equal parts (no two confidences are equal here)."""
    order = np.argsort(confidence)
    ranks = np.arange(len(order)) * bins // len(order)
    total = 0.0
    for b in range(bins):
        part = order[ranks == b]
        if len(part):
            total += len(part) / len(order) * abs(right[part].mean() - confidence[part].mean())
    return total


def test_metrics_have_the_names_and_scale_of_the_notes():
    outputs = outputs_of(n=300)
    policy = ExitPolicy("gate", 0.6)
    got = exit_metrics(outputs, policy)
    names = {"gated_acc", "gated_ece", "total_cost", "cost_fraction"}
    each = ("acc", "ens_acc", "ece", "p_max", "entropy", "margins", "percent_exit", "gated_acc_")
    for block in (1, 2, 4):
        names |= {f"{name}{block}" for name in each}
    names |= {"acc_final", "ens_acc_final", "final_ece", "final_p_max", "final_entropy",
              "final_margins", "percent_exitfinal", "gated_acc_final"}  # fmt: skip
    assert set(got) == names
    p = np.apply_along_axis(softmax, 2, outputs.logits)
    top = np.sort(p, axis=2)
    for e, block in enumerate((1, 2, 4)):
        assert got[f"p_max{block}"] == pytest.approx(p[e].max(axis=1).mean(), rel=1e-5)
        assert got[f"entropy{block}"] == pytest.approx(entropy(p[e], axis=1).mean(), rel=1e-5)
        margin = (top[e, :, -1] - top[e, :, -2]).mean()
        assert got[f"margins{block}"] == pytest.approx(margin, rel=1e-4)
        right = (p[e].argmax(axis=1) == outputs.labels).astype(float)
        assert got[f"acc{block}"] == pytest.approx(right.mean())
        assert got[f"ece{block}"] == pytest.approx(
            ece_equal_mass(p[e].max(axis=1), right), abs=1e-6
        )
        ensemble = p[: e + 1].mean(axis=0).argmax(axis=1) == outputs.labels
        assert got[f"ens_acc{block}"] == pytest.approx(ensemble.mean())
    rates = [got[f"percent_exit{b}"] for b in (1, 2, 4, "final")]
    assert sum(rates) == pytest.approx(1)
    assert got["total_cost"] == pytest.approx(np.dot(rates, outputs.costs))
    by_exit = [got[f"gated_acc_{b}"] for b in (1, 2, 4, "final")]
    assert got["gated_acc"] == pytest.approx(np.dot(rates, by_exit))


def test_an_exit_that_nobody_takes_has_no_accuracy():
    got = exit_metrics(outputs_of(), ExitPolicy.never())
    assert "gated_acc_1" not in got and got["percent_exitfinal"] == 1.0
    assert got["gated_acc"] == got["acc_final"] == got["gated_acc_final"]
    assert summarise(outputs_of(), ExitPolicy.never())["exits"][0]["accuracy"] is None


def test_rates_per_class_against_a_loop():
    outputs = outputs_of()
    chosen = outputs.select(ExitPolicy("gate", 0.5))
    got = exit_rates_per_class(chosen, outputs.labels, num_classes=5, num_gates=3)
    for c in range(4):
        mine = chosen[outputs.labels == c].tolist()
        np.testing.assert_allclose(got[c], [mine.count(e) / len(mine) for e in range(4)])
    assert np.isnan(got[4]).all()  # a class without samples


def test_keep_takes_exits_and_the_final_head():
    outputs = outputs_of()
    kept = outputs.keep([0, 2], costs=np.array([90.0, 270.0, 420.0]))
    np.testing.assert_array_equal(kept.logits, outputs.logits[[0, 2, 3]])
    np.testing.assert_array_equal(kept.gate_logits, outputs.gate_logits[:, [0, 2]])
    assert kept.exits == (1, 4) and kept.costs.tolist() == [90.0, 270.0, 420.0]


def test_file_round_trip_and_broken_files(tmp_path):
    outputs = outputs_of(split="calibration", split_hash="abc")
    path = tmp_path / "sub folder" / "calibration.npz"
    outputs.save(path)
    back = ExitLogits.load(path)
    for name in ("logits", "gate_logits", "labels", "costs"):
        np.testing.assert_array_equal(getattr(back, name), getattr(outputs, name))
    assert (back.exits, back.split, back.split_hash) == ((1, 2, 4), "calibration", "abc")
    assert back.fingerprint == outputs.fingerprint != outputs_of(1).fingerprint
    with pytest.raises(FileNotFoundError, match="no exit outputs"):
        ExitLogits.load(tmp_path / "none.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is no file of exit outputs"):
        ExitLogits.load(path)


def test_shapes_and_numbers_are_checked():
    good = outputs_of()
    with pytest.raises(ValueError, match="logits have shape"):
        ExitLogits(good.logits[:3], good.gate_logits, good.labels, good.costs, good.exits)
    with pytest.raises(ValueError, match="gate logits have shape"):
        ExitLogits(good.logits, good.gate_logits[:, :2], good.labels, good.costs, good.exits)
    bad = good.logits.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="hold nan or inf"):
        ExitLogits(bad, good.gate_logits, good.labels, good.costs, good.exits)
