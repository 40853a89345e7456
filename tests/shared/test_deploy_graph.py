"""Images in, answers out: a wrapped file against the formula in float64."""

import json

import float_networks as nets
import numpy as np
import pytest

from shared_core.deploy.check import ExportError
from shared_core.deploy.facts import METADATA_KEY, Exits, ModelFacts
from shared_core.deploy.graph import set_facts, wrap_chain, wrap_network
from shared_core.deploy.segments import answers_of, full_pass, inputs_of
from shared_core.deploy.session import facts_in, open_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WEIGHTS = nets.layers(5, 3, scale=3.0)


def asked(model, pixels):
    session = open_session(model.SerializeToString())
    (name,) = [one.name for one in session.get_inputs()]
    return session.run(None, {name: pixels})[0]


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("count", [1, 5])
def test_probabilities_are_those_of_the_formula(opset, count):
    pixels = nets.images(count)
    model = wrap_network(nets.network(WEIGHTS, opset=opset), nets.facts(temperature=1.7))
    truth = nets.softmax(nets.outputs(pixels, WEIGHTS), 1.7)
    got = asked(model, pixels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, truth, atol=1e-6)
    (taken,), (given,) = model.graph.input, model.graph.output
    assert (taken.name, given.name) == ("images", "probabilities")
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in taken.type.tensor_type.shape.dim] == [0, 6, 4, 3]


def test_black_white_and_sure_answers_stay_finite():
    pixels = np.stack([np.full((6, 4, 3), v, np.uint8) for v in (0, 255)])
    big = [30 * weight for weight in WEIGHTS]
    got = asked(wrap_network(nets.network(big), nets.facts()), pixels)
    np.testing.assert_allclose(got, nets.softmax(nets.outputs(pixels, big)), atol=1e-5)


@pytest.mark.parametrize("bgr", [False, True])
def test_sigmoid_and_channels_that_are_turned(bgr):
    pixels = nets.images(4)
    facts = nets.facts(activation="sigmoid", bgr=bgr)
    truth = 1 / (1 + np.exp(-nets.outputs(pixels, WEIGHTS, bgr=bgr)))
    got = asked(wrap_network(nets.network(WEIGHTS), facts), pixels)
    np.testing.assert_allclose(got, truth, atol=1e-6)


@pytest.mark.parametrize("activation", ["unit", "none"])
def test_features(activation):
    facts = nets.facts(task="embed", activation=activation, class_names=())
    pixels = nets.images(4)
    truth = nets.outputs(pixels, WEIGHTS)
    if activation == "unit":
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    model = wrap_network(nets.network(WEIGHTS), facts)
    assert model.graph.output[0].name == "features"
    np.testing.assert_allclose(asked(model, pixels), truth, atol=1e-5)
    nothing = wrap_network(nets.network([0 * weight for weight in WEIGHTS]), facts)
    assert (asked(nothing, pixels) == 0).all()  # no division by a length of 0


@pytest.mark.parametrize(
    "names", [("images", "probabilities"), ("image", "images"), ("smallvision/scaled", "features")]
)
def test_a_network_may_use_our_names(names):
    pixels = nets.images(3)
    model = wrap_network(nets.network(WEIGHTS, names=names), nets.facts())
    truth = nets.softmax(nets.outputs(pixels, WEIGHTS))
    np.testing.assert_allclose(asked(model, pixels), truth, atol=1e-6)
    assert {"layer0", "layer1"} <= {node.name for node in model.graph.node}


def test_facts_stand_in_the_file_and_nothing_of_this_machine(tmp_path):
    source = nets.network(WEIGHTS)
    source.graph.node[0].doc_string = source.doc_string = "/home/somebody/net.py"
    source.metadata_props.add(key="author", value="x")
    before = source.SerializeToString()
    path, facts = tmp_path / "model.onnx", nets.facts(temperature=2.0)
    onnx.save(wrap_network(source, facts), path)
    assert source.SerializeToString() == before  # the caller's own is not touched
    assert b"somebody" not in path.read_bytes()
    session = open_session(path)
    assert facts_in(session, where=path) == facts
    assert session.get_modelmeta().custom_metadata_map["author"] == "x"
    other = nets.facts(class_names=("a", "b", "c"))
    set_facts(path, other)
    again = onnx.load(path)
    assert [entry.key for entry in again.metadata_props].count(METADATA_KEY) == 1
    assert facts_in(open_session(path), where=path) == other
    stored = {entry.key: entry.value for entry in again.metadata_props}
    assert ModelFacts.from_dict(json.loads(stored[METADATA_KEY])) == other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"opset": 12}, "opset 12, expected 13 or more"),
        ({"batch": 1}, "batches of 1 alone, expected any batch"),
        ({"size": (4, 6)}, r"images are \[3, 4, 6\]"),
    ],
)
def test_networks_of_another_form_are_refused(words, message):
    with pytest.raises(ExportError, match=message):
        wrap_network(nets.network(WEIGHTS, **words), nets.facts())


def test_other_classes_inputs_and_outputs_are_refused():
    with pytest.raises(ExportError, match="3 outputs an image, expected 2 for the classes"):
        wrap_network(nets.network(WEIGHTS), nets.facts(class_names=("a", "b")))
    wrapped = wrap_network(nets.network(WEIGHTS), nets.facts())
    with pytest.raises(ExportError, match="is no float32"):
        wrap_network(wrapped, nets.facts())
    two = nets.network(WEIGHTS)
    two.graph.output.append(nets._value("sum0", "FLOAT", "batch", 5))
    with pytest.raises(ExportError, match="2 outputs, expected one"):
        wrap_network(two, nets.facts())
    two = nets.network(WEIGHTS)
    two.graph.input.append(nets._value("other", "FLOAT", "batch", 5))
    with pytest.raises(ExportError, match="inputs are image, other; expected one"):
        wrap_network(two, nets.facts())


# -- chains ---------------------------------------------------------------------------------------

BODY = [nets.layers(7, seed=1)[0], nets.layers(7, seed=2)[0][:7, :7].copy()]
HEADS = [nets.layers(3, seed=n)[0][:7].copy() for n in (3, 4)]
EXITS = Exits(after=(2,), costs=(1.0, 2.0), plain_cost=2.0)


def chain_by_hand(pixels):
    tokens, heads = nets.normalised(pixels).reshape(len(pixels), -1), []
    for body, head in zip(BODY, HEADS, strict=True):
        tokens = np.maximum(tokens @ body, 0)
        heads.append(tokens @ head)
    return heads


def segments():
    return [
        nets.segment(BODY[n], HEADS[n], first=n == 0, last=n == 1)
        for n in range(2)
    ]  # fmt: skip


def test_a_chain_takes_images_and_gives_logits_at_every_exit():
    facts = nets.facts(exits=EXITS, temperature=3.0)  # the policy applies temperatures, not it
    models = wrap_chain(segments(), facts)
    sessions = [open_session(model.SerializeToString()) for model in models]
    pixels = nets.images(4)
    found, truth = full_pass(sessions, pixels), chain_by_hand(pixels)
    for outputs, logits in zip(found, truth, strict=True):
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(answers_of(found), np.concatenate(truth, axis=1), atol=1e-5)
    given = inputs_of(sessions, pixels)
    np.testing.assert_array_equal(given[0], pixels)
    np.testing.assert_array_equal(given[1], found[0]["tokens"])
    assert [facts_in(one, where="chain") for one in sessions] == [facts, facts]


def test_chains_that_do_not_fit_are_refused():
    facts = nets.facts(exits=EXITS)
    with pytest.raises(ExportError, match="1 segments of a chain, expected 2"):
        wrap_chain(segments()[:1], facts)
    with pytest.raises(ExportError, match="expected none"):
        wrap_chain(segments(), nets.facts())
    first, last = segments()
    with pytest.raises(ExportError, match="segment 1 gives tokens, logits, gate_logit"):
        wrap_chain([first, first], facts)
    with pytest.raises(ExportError, match="3 outputs an image, expected 2"):
        wrap_chain([first, last], nets.facts(exits=EXITS, class_names=("a", "b")))
    last.graph.output[0].name = last.graph.node[-1].output[0] = "scores"
    with pytest.raises(ExportError, match="segment 1 gives scores; expected logits"):
        wrap_chain([first, last], facts)
