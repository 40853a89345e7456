"""PaddleClas' networks by their names: built, frozen in units, trained, exported, asked.

The package pins old versions, so these run in an environment of its own (``make test-paddleclas``).
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
import vgc_tools as tools

from shared_core.deploy.facts import read_facts
from shared_core.deploy.predictor import open_model
from shared_core.runs import read_result
from visiondistill_gc import export
from visiondistill_gc.deploy.openers import OPENERS
from visiondistill_gc.models import paddleclas_models
from visiondistill_gc.models.paddleclas_models import build_paddleclas, units_of
from visiondistill_gc.models.student_model import build_student, count_parameters
from visiondistill_gc.utils.model_files import load_model, save_model

pytest.importorskip("paddleclas", reason="paddleclas has an environment of its own")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "count", "units"),
    [("ResNet50", 23_569_348, 17), ("MobileNetV2", 2_264_260, 19), ("PPLCNet_x1_0", None, 15)],
)
def test_networks_twice(name, count, units):
    """Sizes as paddle.vision's of the same name, where it has one."""
    for _ in range(2):
        net = build_paddleclas(name, num_classes=4)
        assert count is None or count_parameters(net)["state"] == count
        assert len(units_of(net)) == units


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("name", ["mobilenet_v2", "ResNet18", "PPLCNet_x0_25"])
def test_a_student_is_frozen_unit_by_unit(name, freeze_bn, tmp_path):
    net = build_student(
        num_classes=3, name=name, source="paddleclas", head="plain", frozen=3, freeze_bn=freeze_bn
    )
    before = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    learned = [p for p in net.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.Adam(1e-2, parameters=learned)
    net.train()
    net(paddle.randn([4, 3, 64, 64])).square().mean().backward()
    optimizer.step()
    changed = {k for k, v in net.state_dict().items() if not np.array_equal(before[k], v.numpy())}
    frozen = {id(p) for unit in units_of(net)[:3] for p in unit.parameters()}
    below = {k for k, v in net.state_dict().items() if id(v) in frozen}
    assert below and len(below) < len(before) / 2
    statistics = {k for k in below if k.endswith(("_mean", "_variance"))}
    assert changed & below == (set() if freeze_bn else statistics)
    assert {"out.weight", "fc.weight"} & changed and len(changed - below) > 10
    save_model(tmp_path / "m.pdparams", net, class_names="abc", architecture=name, input_size=64)
    again = load_model(tmp_path / "m.pdparams").net
    images = paddle.randn([2, 3, 64, 64])
    net.eval()
    assert np.array_equal(again(images).numpy(), net(images).numpy())


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, command):
    """Teacher and student by paddleclas' names, from files of its weights of other classes."""
    place = tmp_path_factory.mktemp("paddleclas")
    for name in ("ResNet18", "PPLCNet_x0_25"):
        net = build_paddleclas(name, num_classes=7)
        paddle.save(net.state_dict(), str(place / f"{name}.pdparams"))
    words = tiny(
        place / "run", "--student-source", "paddleclas", "--teacher-source", "paddleclas",
        "--teacher", "ResNet18", "--teacher-pretrained", str(place / "ResNet18.pdparams"),
        "--init", str(place / "PPLCNet_x0_25.pdparams"), "--frozen", "4", "--no-visualdl",
        "--student", "PPLCNet_x0_25", "--one-student",
    )  # fmt: skip
    out = [w for w in words if w not in ("--student-scale", "0.1", "--hidden", "16")]
    done = command(*out)
    assert done.code == 0, done.err
    return place, done


def test_a_run_starts_from_its_files_and_freezes(run):
    place, done = run
    measured = read_result(place / "run" / "result.json")["measured"]
    assert measured["teacher"]["name"] == "ResNet18" and measured["out_of_fold"]["folds"] == [0, 1]
    given = paddle.load(str(place / "PPLCNet_x0_25.pdparams"))
    model = load_model(place / "run" / "models_saved" / "best_model.pdparams")
    after, units = model.net.state_dict(), units_of(model.net)
    frozen = {id(p) for unit in units[:4] for p in unit.parameters()}
    moved = {
        k: np.abs(given[k].numpy() - v.numpy()).max()
        for k, v in after.items()
        if given[k].shape == v.shape
    }
    same = {k for k, far in moved.items() if far < 1e-6}  # the average of weights rounds
    assert {k for k, v in after.items() if id(v) in frozen} <= same
    assert not {"fc.weight", "last_conv.weight"} & same and after["fc.weight"].shape[1] == 2


def test_its_export_answers_as_the_network(run, tmp_path):
    place, _ = run
    done = tools.call(export, place / "run", tmp_path / "model")
    assert done.code == 0, done.err
    facts = read_facts(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    truth = load_model(place / "run" / "models_saved" / "best_model.pdparams").logits(images)
    exps = np.exp(truth - truth.max(axis=1, keepdims=True))
    for runtime in ("onnx", "paddle"):
        assert facts.measured["files"][runtime]["agreement"]["images"] > 5
        said = open_model(tmp_path / "model", runtime=runtime, openers=OPENERS)
        found = said.probabilities(images)
        np.testing.assert_allclose(found, exps / exps.sum(axis=1, keepdims=True), atol=3e-4)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch, tiny, command, tmp_path):
    def no_network(name):
        def build(pretrained=False, **words):
            if pretrained:
                raise RuntimeError("Downloading from https://... failed. Retry limit reached")
            return real(name)(pretrained=False, **words)

        return build

    real = paddleclas_models._maker
    monkeypatch.setattr(paddleclas_models, "_maker", no_network)
    words = tiny(tmp_path / "run", "--student-source", "paddleclas", "--init", "trained")
    done = command(*[w for w in words if w not in ("--student-scale", "0.1", "--hidden", "16")])
    assert done.code == 2 and "by --init FILE" in done.err and done.err.count("error: ") == 1


def test_a_name_that_it_does_not_have():
    with pytest.raises(ValueError, match="no network 'ResNet5', expected for example"):
        build_paddleclas("ResNet5", num_classes=2)
    with pytest.raises(ValueError, match="expected 0 to 19 units"):
        build_paddleclas("MobileNetV2", num_classes=2, frozen=20)
