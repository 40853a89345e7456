"""One predictor for every model folder: right answers by hand, exits as asked, one-line errors."""

import json
import shutil

import numpy as np
import pytest
import tiny_models as tiny

from shared_core.deploy.exit_policy import NEVER, ExitPolicy
from shared_core.deploy.facts import ModelError, read_facts, write_facts
from shared_core.deploy.options import ExitOptions, ModelOptions
from shared_core.deploy.predictor import (
    ExitPredictor,
    NetworkPredictor,
    activate,
    logits_to_run,
    open_asked,
    open_model,
)
from shared_core.runs import UsageError

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def images():
    return tiny.make_images(40)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("a plain model"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return tiny.save_chain(tmp_path_factory.mktemp("a chain"))


def test_a_folder_and_a_bare_file_answer_alike_at_any_batch(plain, images, tmp_path):
    truth = tiny.probabilities_by_hand(images)
    bare = shutil.copy(plain / "model.onnx", tmp_path / "alone.onnx")  # its facts are inside
    for path in (plain, str(plain), plain / "model.onnx", bare):
        predictor = open_model(path)
        np.testing.assert_allclose(predictor.probabilities(images), truth, atol=1e-5)
        one = [predictor.probabilities(images[n : n + 1])[0] for n in range(5)]
        np.testing.assert_allclose(one, truth[:5], atol=1e-5)
        assert (predictor.runtime, predictor.name) == ("onnx", str(path))
        assert predictor.outputs(images).exits is None and predictor.macs(None) == 1000.0


def test_the_runtime_that_is_asked_for_is_the_file_that_answers(tmp_path, images):
    files = {"onnx": ("model.onnx",), "onnx-int8": ("small.onnx",)}
    tiny.save_model(tmp_path, tiny.make_facts(files=files))
    tiny.save_model(
        tmp_path, tiny.make_facts(files=files, default="onnx-int8"), weights=0 * tiny.WEIGHTS
    )
    first, second = (open_model(tmp_path, runtime=name) for name in ("onnx", "onnx-int8"))
    np.testing.assert_allclose(
        first.probabilities(images), tiny.probabilities_by_hand(images), atol=1e-5
    )
    same = second.probabilities(images)
    assert np.ptp(same, axis=0).max() < 1e-6  # weights of 0: every image alike
    assert open_model(tmp_path).runtime == "onnx-int8"  # the record's own choice
    assert open_model(tmp_path / "small.onnx").runtime == "onnx-int8"


def test_options_reach_the_session(plain, monkeypatch):
    from shared_core.deploy import predictor

    asked = []
    real = predictor.open_session

    def seen(path, **words):
        asked.append(words)
        return real(path, threads=words["threads"])

    monkeypatch.setattr(predictor, "open_session", seen)
    open_asked(ModelOptions(plain, threads=3, device="cuda:1"))
    open_asked(ModelOptions(plain, threads=None))
    assert asked[0] == {"threads": 3, "device": "cuda:1"} and asked[1]["threads"] >= 1


def test_a_chain_leaves_where_it_does_by_hand(chain, images):
    predictor = open_model(chain)
    left, truth = tiny.exits_by_hand(images)
    assert set(left) == {0, 1, 2}  # or a mix-up would not be seen
    outputs = predictor.outputs(images)
    np.testing.assert_array_equal(outputs.exits, left)
    np.testing.assert_allclose(outputs.values, truth, atol=1e-5)
    single = [int(predictor.outputs(images[n : n + 1]).exits[0]) for n in range(12)]
    assert single == left[:12].tolist()
    assert [predictor.exit_name(n) for n in (0, 1, 2)] == ["block 2", "block 5", "final"]
    assert [predictor.macs(n) for n in (0, 1, 2, None)] == [100, 250, 700, 700]


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        (ExitOptions(), 0.6),
        (ExitOptions(point="careful"), 0.9),
        (ExitOptions(point="fast"), 0.3),
        (ExitOptions(kind="max_prob", thresholds=(0.7,)), 0.7),
        (ExitOptions(none=True), NEVER),
    ],
)
def test_exits_are_those_that_are_asked_for(chain, images, options, threshold):
    predictor = open_model(chain).with_exits(options)
    left, truth = tiny.exits_by_hand(images, threshold)
    outputs = predictor.outputs(images)
    np.testing.assert_array_equal(outputs.exits, left)
    np.testing.assert_allclose(outputs.values, truth, atol=1e-5)
    state = predictor.policy_state()
    assert (state is None) == options.none
    assert options.none or state["thresholds"] == [threshold]


def test_a_rule_of_another_kind_takes_its_own_record(chain, images):
    predictor = open_model(chain).with_exits(ExitOptions(kind="margin"))
    assert predictor.policy == ExitPolicy("margin", 0.5, tiny.EXIT_TEMPERATURES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExitOptions(point="reckless"), "expected one of careful, fast"),
        (ExitOptions(kind="entropy"), "no record gives .* thresholds for --policy entropy"),
        (ExitOptions(kind="gate", thresholds=(0.5,)), "asks learned gates"),
        (ExitOptions(kind="margin", thresholds=(0.5, 0.6, 0.7)), "for 2 exits"),
    ],
)
def test_exits_that_do_not_fit_are_refused(chain, options, said):
    with pytest.raises(UsageError, match=said):
        open_model(chain).with_exits(options)


def test_exits_are_refused_where_there_are_none(plain):
    for options in (ExitOptions(point="fast"), ExitOptions(kind="margin", thresholds=(0.1,))):
        with pytest.raises(UsageError, match="has no exits"):
            open_model(plain).with_exits(options)
    assert open_model(plain).with_exits(ExitOptions(none=True)).outputs  # it runs to the end anyway


def test_a_chain_without_thresholds_says_so(tmp_path, images):
    facts = tiny.exit_facts()
    exits = type(facts.exits)(after=(2, 5), costs=tiny.MACS, plain_cost=1.0)
    predictor = open_model(tiny.save_chain(tmp_path, facts.replaced(exits=exits)))
    assert set(predictor.outputs(images).exits) == {2}
    with pytest.raises(UsageError, match="no record gives .* thresholds for its exits"):
        predictor.with_exits(ExitOptions())
    assert predictor.with_exits(ExitOptions(none=True)).policy.thresholds == (NEVER,)


# -- networks of a project ------------------------------------------------------------------------


def test_a_network_gets_normalised_images_and_its_facts_make_the_answers(images):
    seen = []

    def network(batch):
        seen.append(batch)
        return batch.mean(axis=(2, 3)) @ np.ones((3, 4)) * np.arange(4)

    facts = tiny.make_facts(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), temperature=2.0)
    run = logits_to_run(facts, network)
    got = NetworkPredictor(facts, run, runtime="torch", name="x").probabilities(images)
    batch = ((images / 255 - facts.mean) / facts.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(seen[0], batch, atol=1e-5)
    powers = np.exp(batch.mean(axis=(2, 3)) @ np.ones((3, 4)) * np.arange(4) / 2.0)
    np.testing.assert_allclose(got, powers / powers.sum(axis=1, keepdims=True), atol=1e-5)


def test_activations():
    x = np.array([[-800.0, 0.0, 800.0], [1.0, 2.0, 2.0]])
    np.testing.assert_allclose(activate(x, "sigmoid")[0], [0, 0.5, 1])
    np.testing.assert_allclose(activate(x, "sigmoid", 2.0)[1], 1 / (1 + np.exp(-x[1] / 2)), 1e-6)
    np.testing.assert_allclose(activate(x, "unit")[1], x[1] / 3, rtol=1e-6)
    np.testing.assert_allclose(activate(x, "none"), x)
    assert activate(x, "softmax")[0].tolist() == [0, 0, 1]


def test_openers_come_first_and_may_pass(plain, images):
    asked = []

    def mine(path, *, runtime, threads, device):
        asked.append((path, runtime, threads, device))
        if runtime != "paddle":
            return None
        run = lambda images: np.full((len(images), 4), 0.25)  # noqa: E731
        return NetworkPredictor(tiny.make_facts(), run, runtime=runtime, name="mine")

    found = open_model(plain, runtime="paddle", threads=2, device="gpu", openers=(mine,))
    assert found.name == "mine" and asked == [(plain, "paddle", 2, "gpu")]
    assert open_model(plain, openers=(mine,)).name == str(plain)


def test_pixels_of_another_kind_are_refused(plain, images):
    predictor = open_model(plain)
    for wrong in (images.astype(np.float32), images[:, :7], images[0], images[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, 8, 8, 3\)"):
            predictor.outputs(wrong)


# -- errors ---------------------------------------------------------------------------------------


def refused(path, **words):
    with pytest.raises((ValueError, OSError)) as caught:
        open_model(path, **words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_opened_is_said_in_one_line(plain, tmp_path):
    assert "does not exist" in refused(tmp_path / "none")
    assert "expected a folder that an export wrote" in refused(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"x")
    assert "is no model that this command knows" in refused(tmp_path / "x.pth")
    (tmp_path / "x.onnx").write_bytes(b"garbage")
    assert "cannot open it" in refused(tmp_path / "x.onnx")
    assert "expected one of: onnx" in refused(plain, runtime="onnx-int8")
    assert "is a file for ONNX Runtime" in refused(plain / "model.onnx", runtime="openvino")


def test_a_damaged_or_swapped_file_is_noticed(plain, tmp_path):
    import hashlib

    folder = shutil.copytree(plain, tmp_path / "m")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    write_facts(folder, read_facts(folder).replaced(sha256={"model.onnx": digest}))
    open_model(folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[data.find(tiny.WEIGHTS.tobytes()) + 3] ^= 1  # one bit of one weight
    (folder / "model.onnx").write_bytes(bytes(data))
    assert "is damaged or another file" in refused(folder)
    assert "is damaged or another file" in refused(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    assert "model.onnx is missing" in refused(folder)


def test_a_folder_of_an_older_format_says_so(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"format": "gfnet_dynn.model/1"}))
    assert "expected 'smallvision.model/1'" in refused(tmp_path)
    (tmp_path / "model.json").write_text("[" * 100_000)
    assert "is no JSON" in refused(tmp_path)


def test_networks_of_another_shape_are_refused(plain, chain, tmp_path):
    facts = read_facts(plain)
    five = (*tiny.CLASSES, "fifth")
    tiny.save_model(tmp_path / "five", facts.replaced(class_names=five))
    assert "gives 4 numbers for 5 classes" in refused(tmp_path / "five")
    shutil.copytree(chain, tmp_path / "segment")
    shutil.copy(chain / "segment1.onnx", tmp_path / "segment" / "segment0.onnx")
    shutil.copy(chain / "segment1.onnx", tmp_path / "five" / "model.onnx")
    assert "expected uint8 images alone" in refused(tmp_path / "five")
    assert "one segment of a chain" in refused(chain / "segment1.onnx")
    shutil.copy(chain / "segment2.onnx", tmp_path / "segment" / "segment1.onnx")
    assert "hands on" in refused(tmp_path / "segment")


def test_a_runtime_of_a_project_is_left_to_it(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "m")
    (folder / "net.pt2").write_bytes(b"x")
    files = {"onnx": ("model.onnx",), "exported-program": ("net.pt2",)}
    write_facts(folder, read_facts(folder).replaced(files=files))
    assert "opened by the commands of tiny alone" in refused(folder, runtime="exported-program")
    facts = read_facts(folder).replaced(default="exported-program")
    write_facts(folder, facts)
    assert open_model(folder).runtime == "onnx"  # what can be opened here
    write_facts(folder, facts.replaced(files={"exported-program": ("net.pt2",)}))
    assert "opened by the commands of tiny alone" in refused(folder)


def test_openvino_runs_an_ir_and_says_when_it_is_missing(plain, tmp_path, images, monkeypatch):
    openvino = pytest.importorskip("openvino")
    folder = shutil.copytree(plain, tmp_path / "ir")
    openvino.save_model(
        openvino.Core().read_model(str(plain / "model.onnx")), folder / "model.xml", False
    )
    files = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
    write_facts(folder, read_facts(folder).replaced(files=files))
    truth = tiny.probabilities_by_hand(images)
    for path, runtime in ((folder, "openvino"), (folder / "model.xml", "auto")):
        predictor = open_model(path, runtime=runtime)
        first = predictor.probabilities(images)
        predictor.probabilities(images[::-1].copy())
        np.testing.assert_allclose(first, truth, atol=1e-5)  # not overwritten by the next answer
        assert predictor.runtime == "openvino"
    assert "expected cpu" in refused(folder, runtime="openvino", device="cuda")
    (folder / "model.xml").write_text("<net/>")
    assert "OpenVINO cannot open it" in refused(folder, runtime="openvino")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ImportError, match="pip install openvino"):
        open_model(folder, runtime="openvino")


def test_an_exit_predictor_needs_exits():
    with pytest.raises(ValueError, match="has no exits"):
        ExitPredictor(tiny.make_facts(), None, runtime="x", name="x", has_gates=False)
    assert issubclass(ModelError, ValueError)
