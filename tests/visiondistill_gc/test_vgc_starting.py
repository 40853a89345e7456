"""Trained weights below, a probe as head, rates, frozen units, the floor of trained features."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shared_core.datasets import decode
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.seeds import seed_all
from shared_core.runs import read_result
from shared_core.weights.catalogue import entry
from shared_core.weights.finding import installed_file
from shared_core.weights.reading import read_weights
from visiondistill_gc.config import parse
from visiondistill_gc.deploy.openers import facts_of
from visiondistill_gc.models.lite_model import Lite
from visiondistill_gc.models.student_model import build_student
from visiondistill_gc.models.teacher_model import Renormalised
from visiondistill_gc.options import TrainingOptions
from visiondistill_gc.run import stages
from visiondistill_gc.run.report import verdicts
from visiondistill_gc.utils.model_files import load_model
from visiondistill_gc.utils.transforms import eval_view

LITE0 = entry("lite0")
needs_weights = pytest.mark.skipif(
    installed_file(LITE0) is None, reason="lite0's package is not installed"
)
WORDS = (
    *("--scale", "rehearsal", "--builtin-classes", "3", "--builtin-images", "20", "--epochs", "2"),
    *(
        "--input-size",
        "32",
        "--n-splits",
        "2",
        "--folds",
        "0",
        "--batch-size",
        "8",
        "--frozen",
        "10",
    ),
    *("--teacher", "lite0", "--teacher-frozen", "5", "--workers", "0", "--threads", "1"),
    *("--device", "cpu", "--no-visualdl", "--allow-untrained-teacher", "--compare-seeds"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, command):
    """A run from trained weights, what it said, and its networks where training began."""
    folder, began, real = tmp_path_factory.mktemp("started") / "run", {}, stages.fit

    def spy(training):
        net = training.net
        began[training.stage] = (
            training,
            {name: value.numpy().copy() for name, value in net.state_dict().items()},
        )
        return real(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", spy)
        done = command(*WORDS, "--output", folder)
    assert done.code == 0, done.err
    return folder, done, began


def stored(folder):
    """The features of the run, its labels and folds in the same order."""
    (file,) = (folder / "features").glob("*.npz")
    with np.load(file) as kept:
        features = kept["folds"], kept["test"]
    table = json.loads((folder / "folds.json").read_text())
    samples = json.loads((folder / "split.json").read_text())["samples"]
    label = {path: label for path, label, _, _ in samples}
    held = [one for path, one, _, part in samples if part == "test"]
    return *features, np.array([label[p] for p in table]), np.array(list(table.values())), held


@needs_weights
def test_body_and_head_where_training_begins(run):
    folder, _, began = run
    training, weights = began["fold0"]
    package = read_weights(installed_file(LITE0))
    for name in ("conv_stem.weight", "blocks.6.0.conv_pwl.weight", "conv_head.weight"):
        assert np.array_equal(weights[name], package[name])
    features, _, labels, folds = stored(folder)[:4]
    logits = features @ weights["classifier.weight"] + weights["classifier.bias"]
    assert (logits.argmax(axis=1) == labels)[folds != 0].mean() > 0.95  # it knows what it saw
    view = eval_view(32)
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(folds != 0)[:4]
    paths = [training.images.paths[i] for i in range(4)]
    images = np.stack([view(decode(path), rng) for path in paths])
    net = Lite("efficientnet_lite0", num_classes=3)
    net.set_state_dict({name: paddle.to_tensor(value) for name, value in weights.items()})
    net.eval()
    said = net(Normalizer(LITE0.mean, LITE0.std)(images)).numpy()
    assert said == pytest.approx(logits[rows], abs=2e-3 * float(np.abs(logits).max()))


@needs_weights
def test_what_is_frozen_stays_and_the_rest_learns(run):
    folder, _, began = run
    training, before = began["fold0"]
    after = load_model(folder / "models_saved" / "best_model_fold0.pdparams").net
    changed = {  # but for the rounding of the moving average
        name
        for name, value in after.state_dict().items()
        if not np.allclose(value.numpy(), before[name], rtol=1e-5, atol=1e-7)
    }
    below = ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(3)), "blocks.3.0")
    assert not [name for name in changed if name.startswith(below)]
    assert {"conv_head.weight", "classifier.weight", "blocks.6.0.conv_pwl.weight"} <= changed
    assert not [name for name in changed if name.endswith(("_mean", "_variance"))]
    net = training.net  # its frozen units ran through Paddle Inference
    images = paddle.to_tensor(np.random.default_rng(1).normal(size=(3, 3, 32, 32)), "float32")
    fast, net._front = net(images).numpy(), None
    slow = net(images).numpy()
    assert fast == pytest.approx(slow, abs=1e-3 * float(np.abs(slow).max()))


@needs_weights
def test_the_floor_is_that_of_the_stored_features(run):
    folder, done, _ = run
    features, test, labels, folds, held = stored(folder)
    found = read_result(folder / "result.json")["measured"]["trained_floor"]
    assert found["network"] == "efficientnet_lite0" and found["input_size"] == 32
    for name, fit, judge, truth in (
        ("out_of_fold", folds != 0, features[folds == 0], labels[folds == 0]),
        ("test", folds >= 0, test, held),
    ):
        by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=300))
        right = by_hand.fit(features[fit], labels[fit]).score(judge, truth)
        assert found[name]["images"] == len(truth)
        assert found[name]["accuracy"] == pytest.approx(right, abs=1.01 / len(truth))
    last = done.out.strip().splitlines()[-1]
    for line in (last, (folder / "report.md").read_text().split("\n\n")[1]):
        assert f"trained features, linear ({found['out_of_fold']['accuracy']:.4f})" in line
        assert "the best floor without a network" in line


@needs_weights
def test_where_it_started_is_written_down(run):
    folder, done, _ = run
    start = read_result(folder / "result.json")["measured"]["start"]
    for who in ("teacher", "student"):
        assert start[who]["sha256"] == LITE0.sha256 and start[who]["licence"] == "Apache-2.0"
        assert f"the {who} starts from efficientnet_lite0 (licence Apache-2.0)" in done.out
    model = load_model(folder / "models_saved" / "best_model_fold0.pdparams")
    assert model.mean == pytest.approx(LITE0.mean)
    assert facts_of(model).provenance["initial_weights"] == start
    assert LITE0.sha256[:12] in (folder / "report.md").read_text()


@needs_weights
def test_without_weights_it_starts_from_nothing(run, tmp_path, command, monkeypatch):
    found = []

    def stop(training):
        found.append(training)
        raise ValueError("far enough")

    monkeypatch.setattr(stages, "fit", stop)
    words = [w for w in WORDS if w not in ("--frozen", "10", "--teacher-frozen", "5")]
    words += ["--init", "none", "--student", "lite0", "--teacher-epochs", "1"]
    with pytest.raises(ValueError, match="far enough"):
        command(*words, "--output", tmp_path / "run")
    (training,) = found
    trained = run[2]["fold0"][1]["conv_stem.weight"]
    assert np.abs(training.net.conv_stem.weight.numpy() - trained).max() > 0.01
    assert training.net.frozen == 0 and not getattr(training.net, "keep_norms", False)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_head_and_body_learn_at_their_rates(optimizer):
    seed_all(0)
    net = build_student(num_classes=3, scale=0.1, hidden=8, frozen=2, dropout=0.0)
    how = TrainingOptions(lr=1e-3, head_rate=5.0, weight_decay=0.0, optimizer=optimizer)
    steps = stages.make_optimizer(net, how)
    before = {name: value.numpy().copy() for name, value in net.named_parameters()}
    net.train()
    net(paddle.randn([8, 3, 32, 32])).square().mean().backward()
    steps.step()
    moved = {n: np.abs(v.numpy() - before[n]).max() for n, v in net.named_parameters()}
    # Adam's first step is the rate itself.
    assert moved["classifier.6.weight"] == pytest.approx(5e-3, rel=1e-2)
    assert moved["features.17.conv.2.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["features.0.0.weight"] == 0


def test_a_teacher_of_another_normalisation_sees_its_own():
    net = paddle.nn.Flatten()  # what it gives is what it sees
    net.normal = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    given = Normalizer(LITE0.mean, LITE0.std)(images)
    wanted = ((images / 255 - net.normal[0]) / net.normal[1]).transpose(0, 3, 1, 2).reshape(2, 75)
    found = Renormalised(net, (LITE0.mean, LITE0.std))(given).numpy()
    assert found == pytest.approx(wanted, abs=1e-5)


def test_defaults_of_a_folder_of_ones_own(tmp_path, monkeypatch):
    words = ["--data-path", str(tmp_path)]
    settings = parse(words, prog="main.py")
    assert settings.run.scale == "short" and settings.training.probe
    assert (settings.student.student, settings.student.init) == ("efficientnet_lite0", "trained")
    assert settings.student.frozen == 14
    monkeypatch.setattr("visiondistill_gc.config.installed_file", lambda network: None)
    assert parse(words, prog="main.py").teacher.teacher == "efficientnet_lite0"
    scratch = parse([*words, "--init", "none"], prog="main.py")
    assert scratch.teacher.teacher_epochs > 0 and not scratch.training.probe
    assert scratch.student.frozen == scratch.teacher.teacher_frozen == 0


def test_a_student_that_nobody_knows(tmp_path, command):
    done = command("--scale", "rehearsal", "--student", "nothing", "--output", tmp_path / "run")
    assert done.code == 2 and "--student nothing: expected one of efficientnet_lite0" in done.err


def test_verdicts():
    measured = {
        "out_of_fold": {"pooled_accuracy": 0.9},
        "test": {"ensemble": {"accuracy": 0.8}},
        "trained_floor": {"out_of_fold": {"accuracy": 0.95}},
        "floor": {"plain": 0.5, "engineered": 0.7},
        "comparison": {"differences": {"distilled - undistilled": {
            "mean": 0.01, "low": -0.02, "high": 0.04, "n": 3}}},
    }  # fmt: skip
    trained, plain, taught = verdicts(measured)
    assert trained == "0.9000 out of fold, BELOW trained features, linear (0.9500)."
    assert plain == "0.8000 on held-out images, above the best floor without a network (0.7000)."
    assert taught == (
        "Distillation did not help for sure: +1.0 points (95 % interval -2.0 to +4.0, 3 seeds)."
    )
    gap = measured["comparison"]["differences"]["distilled - undistilled"]
    gap.update(low=0.001)
    assert "Distillation helped: +1.0" in verdicts(measured)[2]
    gap.update(mean=-0.03, low=-0.04, high=-0.02)
    assert "did not help, it hurt: -3.0" in verdicts(measured)[2]
    # A single student is judged where nothing was chosen, and so is one that the folds taught.
    measured["trained_floor"]["test"] = {"accuracy": 0.85}
    assert verdicts(measured)[1] == (
        "0.8000 on held-out images, BELOW trained features, linear (0.8500)."
    )
    measured["test"]["one"] = {"accuracy": 0.86}
    assert verdicts(measured)[2] == (
        "The one student: 0.8600 on held-out images, above trained features, linear (0.8500)."
    )
    measured["validated"] = "validation"
    first = verdicts(measured)[0]
    assert first == "0.8000 on held-out images, BELOW trained features, linear (0.8500)."
