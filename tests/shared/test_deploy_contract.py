"""int8 under a contract: a layer that it ruins goes back to float, and what is slow is refused."""

import float_networks as nets
import numpy as np
import pytest

from shared_core.deploy import contract
from shared_core.deploy.contract import quantize_within
from shared_core.deploy.facts import Exits
from shared_core.deploy.graph import wrap_chain, wrap_network
from shared_core.deploy.quantize import qdq_facts
from shared_core.deploy.segments import answers_of, full_pass
from shared_core.deploy.session import open_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
PIXELS, HELD = nets.images(48), nets.images(200, seed=11)


def fragile():
    """Six layers; what the third gives has one huge number, which the fourth does not look at."""
    weights = nets.layers(12, 12, 12, 12, 12, 3, scale=2.0, seed=5)
    weights[2][:, 0] = np.abs(weights[2][:, 0]) * 3e4
    weights[3][0] = 0
    return weights


def judge_of(classes):
    def judge(files):
        sessions = [open_session(path) for path in files]
        got = answers_of(full_pass(sessions, HELD))
        return float((got.argmax(axis=1) == classes).mean())

    return judge


@pytest.fixture(scope="module")
def ruined(tmp_path_factory):
    folder, weights = tmp_path_factory.mktemp("fragile"), fragile()
    onnx.save(wrap_network(nets.network(weights), nets.facts()), folder / "float.onnx")
    return folder, nets.outputs(HELD, weights).argmax(axis=1)


def kept_float(path):
    graph = onnx.load(path).graph
    whole = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    return {n.name for n in graph.node if n.op_type == "Gemm" and n.input[1] not in whole}


def test_the_layers_that_int8_ruins_go_back_to_float(ruined):
    folder, classes = ruined
    target, judge = folder / "int8.onnx", judge_of(classes)
    found = quantize_within(
        folder / "float.onnx", target, PIXELS, judge=judge, max_accuracy_loss=0.05,
        min_speedup=None,
    )  # fmt: skip
    assert found.kept and not found.reason
    # Both sides of the huge number, nothing else; and the file says the same as the result.
    assert set(found.kept_float) == kept_float(target) == {"layer2", "layer3"}
    assert found.layers == qdq_facts(target).heavy_quantized == 4
    assert found.float_score == 1.0 and judge([target]) == found.int8_score >= 0.95
    assert found.float_bytes == (folder / "float.onnx").stat().st_size
    assert found.int8_bytes == target.stat().st_size
    assert "2 stay float (layer2, layer3)" in found.line() and "kept" in found.line()


def test_what_would_lose_too_much_is_refused_with_the_numbers(ruined, monkeypatch):
    folder, classes = ruined
    target = folder / "refused.onnx"
    monkeypatch.setattr(contract._Candidates, "most_sensitive_first", lambda self, *_: self.layers)
    found = quantize_within(  # the ruined layers come last: half of all is not enough
        folder / "float.onnx", target, PIXELS, judge=judge_of(classes), max_accuracy_loss=0.05,
        min_speedup=None,
    )  # fmt: skip
    assert not found.kept and not target.exists()
    assert found.float_score - found.int8_score > 0.05
    loss = f"{found.float_score - found.int8_score:.4f}"
    assert f"it would lose {loss} of 1.0000, allowed 0.0500" in found.line()
    assert found.as_dict()["kept"] is False


def test_layers_are_put_back_by_what_was_measured(ruined):
    folder, _ = ruined
    candidates = contract._Candidates([folder / "float.onnx"], PIXELS, {})
    order = [name for _, name in candidates.most_sensitive_first(PIXELS, folder)]
    assert set(order[:2]) == {"layer2", "layer3"} and len(order) == 6


def timed(float_ms, int8_ms):
    """What a clock would say, for batches of 1 and 16."""

    def measure(runs, images, *, batches):
        assert list(runs) == ["float", "int8"]
        for run in runs.values():
            run(images[:1])
        return {
            name: {str(n): {"cpu_ms": ms[k], "wall_ms": 9.0} for k, n in enumerate(batches)}
            for name, ms in (("float", float_ms), ("int8", int8_ms))
        }

    return measure


@pytest.mark.parametrize(
    ("int8_ms", "least", "kept"),
    [
        ((1.0, 1.0), 1.0, True),
        ((1.0, 2.1), 1.0, False),  # slower at one batch size
        ((2.0, 2.0), 1.0, False),  # no faster
        ((2.0, 2.1), None, True),  # not asked
        ((1.5, 1.5), 1.5, False),
    ],
)
def test_int8_that_is_not_faster_here_is_refused(tmp_path, monkeypatch, int8_ms, least, kept):
    weights = nets.layers(12, 3, scale=2.0)
    onnx.save(wrap_network(nets.network(weights), nets.facts()), tmp_path / "float.onnx")
    monkeypatch.setattr(contract, "measure_latency", timed((2.0, 2.0), int8_ms))
    found = quantize_within(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", PIXELS, judge=lambda files: 1.0,
        min_speedup=least,
    )  # fmt: skip
    assert found.kept is kept is (tmp_path / "int8.onnx").exists()
    assert found.speedup == pytest.approx(min(2 / int8_ms[0], 2 / int8_ms[1]))
    if not kept:
        assert f"it is {found.speedup:.2f} times as fast here" in found.reason


def test_no_layer_is_tried_where_int8_is_slow_anyway(ruined, monkeypatch):
    folder, classes = ruined
    monkeypatch.setattr(contract, "measure_latency", timed((1.0, 1.0), (2.0, 2.0)))
    monkeypatch.setattr(contract, "_search", lambda *_: pytest.fail("it was searched"))
    found = quantize_within(
        folder / "float.onnx", folder / "slow.onnx", PIXELS, judge=judge_of(classes)
    )
    assert not found.kept and "it would lose" in found.reason and "as fast here" in found.reason


def test_the_least_number_of_layers_is_found(tmp_path):
    weights = nets.layers(*[6] * 9, 3)
    onnx.save(wrap_network(nets.network(weights), nets.facts()), tmp_path / "float.onnx")
    tried = []

    def judge(files):
        count = len(kept_float(files[0]))
        tried.append(count)
        return 1.0 if count >= 3 else 0.0

    found = quantize_within(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", PIXELS[:8], judge=judge, min_speedup=None
    )
    assert found.kept and len(found.kept_float) == 3 and len(tried) < 9


def test_a_chain_is_quantized_as_one(tmp_path):
    body = [nets.layers(9, seed=1)[0], nets.layers(9, seed=2)[0][:9, :9].copy()]
    heads = [nets.layers(3, seed=n)[0][:9].copy() for n in (3, 12)]
    body[1][:, 0] = np.abs(body[1][:, 0]) * 1e5  # ruins the second segment's head
    heads[1][0] = 0
    facts = nets.facts(exits=Exits(after=(2,), costs=(1.0, 2.0), plain_cost=2.0))
    floats = [nets.segment(body[n], heads[n], first=n == 0, last=n == 1) for n in range(2)]
    sources = [tmp_path / f"segment{n}.onnx" for n in range(2)]
    for path, model in zip(sources, wrap_chain(floats, facts), strict=True):
        onnx.save(model, path)
    exact = answers_of(full_pass([open_session(path) for path in sources], HELD))
    assert len(set(exact[:, 3:].argmax(axis=1))) == 3

    def judge(files):
        got = answers_of(full_pass([open_session(path) for path in files], HELD))
        return float((got[:, 3:].argmax(axis=1) == exact[:, 3:].argmax(axis=1)).mean())

    targets = [tmp_path / f"segment{n}.int8.onnx" for n in range(2)]
    found = quantize_within(sources, targets, PIXELS, judge=judge, min_speedup=None,
                            max_accuracy_loss=0.05)  # fmt: skip
    assert found.kept and set(found.kept_float) == {"1:layer", "1:head"}
    assert [qdq_facts(path).heavy_quantized for path in targets] == [2, 0]
    assert judge(targets) == found.int8_score
    assert found.int8_bytes == sum(path.stat().st_size for path in targets)
