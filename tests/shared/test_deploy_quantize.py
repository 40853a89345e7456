"""int8 files: ranges, scales and layers looked up in the graph and compared with NumPy."""

import float_networks as nets
import numpy as np
import pytest
from onnx import numpy_helper

from shared_core.deploy.graph import wrap_network
from shared_core.deploy.quantize import (
    METHODS,
    Quantizer,
    check_symmetric,
    qdq_facts,
    quantize_dynamic,
    quantize_static,
)
from shared_core.deploy.session import facts_in, open_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WEIGHTS = nets.layers(16, 12, 3, scale=2.0)
PIXELS = nets.images(40)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    onnx.save(wrap_network(nets.network(WEIGHTS), nets.facts()), path)
    return path


def constants(path):
    graph = onnx.load(path).graph
    return graph, {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def range_of(path, tensor):
    """Least and largest value that the quantized ``tensor`` can have."""
    graph, values = constants(path)
    node = next(n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == tensor)
    scale, zero = (values[name] for name in node.input[1:])
    limits = np.iinfo(zero.dtype)
    return (limits.min - int(zero)) * float(scale), (limits.max - int(zero)) * float(scale)


def test_all_layers_become_int8_and_the_answers_stay(source, tmp_path):
    target = tmp_path / "int8.onnx"
    found = quantize_static(source, target, [PIXELS])
    assert (found.heavy, found.heavy_quantized) == (3, 3)
    assert set(found.kinds) >= {"int8", "uint8"} and not found.symmetric
    assert found.size_bytes == target.stat().st_size
    held = nets.images(64, seed=9)
    truth = nets.softmax(nets.outputs(held, WEIGHTS))
    session = open_session(target)
    got = session.run(None, {"images": held})[0]
    assert (
        1e-5 < np.abs(got - truth).max() < 0.1 and (got.argmax(1) == truth.argmax(1)).mean() > 0.9
    )
    assert facts_in(session, where=target) == nets.facts()  # the metadata goes along
    # The normalisation, whose values no weight multiplies, is not quantized.
    made = {n.input[0] for n in onnx.load(target).graph.node if n.op_type == "QuantizeLinear"}
    assert not any(name.startswith("smallvision/") for name in made)


def test_ranges_are_those_of_the_images(source, tmp_path):
    seen = []
    order = np.maximum(nets.outputs(PIXELS, WEIGHTS[:1]), 0).max(axis=1).argsort()
    for pixels in (PIXELS[order], (PIXELS[order] // 2).astype(np.uint8)):  # the largest comes last
        quantize_static(source, tmp_path / "int8.onnx", [pixels[:23], pixels[23:]])
        hidden = np.maximum(nets.outputs(pixels, WEIGHTS[:1]), 0)
        low, high = range_of(tmp_path / "int8.onnx", "relu0")
        assert low == 0 and high == pytest.approx(hidden.max(), rel=1e-4)
        seen.append(high)
    assert seen[0] != seen[1]


def test_how_a_range_is_found(tmp_path):
    weights = [np.abs(WEIGHTS[0]), *WEIGHTS[1:]]
    weights[0][:, 1:] *= 0.01  # the first number of an image is its largest
    path = tmp_path / "float.onnx"
    onnx.save(wrap_network(nets.network(weights), nets.facts()), path)
    pixels = np.random.default_rng(2).integers(190, 216, (16_000, 6, 4, 3)).astype(np.uint8)
    pixels[7] = 255  # one value of 256,000
    hidden = np.maximum(nets.outputs(pixels, weights[:1]), 0)
    highs = {}
    for method in METHODS:
        quantize_static(path, tmp_path / f"{method}.onnx", [pixels], method=method)
        highs[method] = range_of(tmp_path / f"{method}.onnx", "relu0")[1]
    assert highs["minmax"] == pytest.approx(hidden.max(), rel=1e-4)
    # 0.001 % of the values are left out, half of them on either side.
    assert highs["percentile"] == pytest.approx(np.percentile(hidden, 100 - 0.0005), rel=0.01)
    assert highs["percentile"] < highs["entropy"] < 0.9 * highs["minmax"]


def test_each_output_channel_of_a_weight_has_its_scale(source, tmp_path):
    weights = [WEIGHTS[0] * np.geomspace(1e-3, 1, 16).astype(np.float32), *WEIGHTS[1:]]
    path = tmp_path / "float.onnx"
    onnx.save(wrap_network(nets.network(weights), nets.facts()), path)
    quantize_static(path, tmp_path / "int8.onnx", [PIXELS])
    graph, values = constants(tmp_path / "int8.onnx")
    node = next(
        n for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0].startswith("w0")
    )  # fmt: skip
    scale, whole = values[node.input[1]], values[node.input[0]]
    np.testing.assert_allclose(scale, np.abs(weights[0]).max(axis=0) / 127, rtol=0.01)
    np.testing.assert_allclose(whole * scale, weights[0], atol=scale.max() / 2 * 1.01)
    assert whole.dtype == np.int8


def test_symmetric_files_are_what_tensorrt_takes(source, tmp_path):
    target = tmp_path / "int8.onnx"
    found = quantize_static(source, target, [PIXELS], scheme="s8s8", quantize_bias=False)
    assert found.symmetric and found.kinds == ("int8",)
    assert check_symmetric(target) == found
    low, high = range_of(target, "relu0")
    hidden = np.maximum(nets.outputs(PIXELS, WEIGHTS[:1]), 0).max()
    assert high == pytest.approx(hidden, rel=0.01) and low == pytest.approx(-high, rel=0.02)
    with pytest.raises(ValueError, match="no DequantizeLinear"):
        check_symmetric(source)
    quantize_static(source, target, [PIXELS])
    with pytest.raises(ValueError, match="a zero point is not 0 of int8"):
        check_symmetric(target)
    Quantizer(source, [PIXELS], scheme="s8s8", quantize_bias=False).write(
        target, keep_float=["layer1"]
    )
    with pytest.raises(ValueError, match="1 layers compute in float"):
        check_symmetric(target)


def biased(tmp_path):
    """A convolution with a bias, an addition and a mean behind it."""
    from onnx import helper

    rng = np.random.default_rng(4)
    nodes = [
        nets._node("Conv", "image w bias", "a", name="conv0", pads=[1, 1, 1, 1]),
        nets._node("Relu", "a", "b", name="relu"),
        nets._node("Conv", "b w1", "c", name="conv1", pads=[1, 1, 1, 1]),
        nets._node("Add", "b c", "d", name="sum"),
        nets._node("GlobalAveragePool", "d", "e", name="mean"),
        nets._node("Flatten", "e", "f", name="flat"),
        nets._node("Gemm", "f w2", "logits", name="head"),
    ]
    values = {"w": (8, 3, 3, 3), "bias": (8,), "w1": (8, 8, 3, 3), "w2": (8, 3)}
    graph = helper.make_graph(
        nodes, "conv", [nets._value("image", "FLOAT", "N", 3, *nets.SIZE)],
        [nets._value("logits", "FLOAT", "N", 3)],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32) / 4, n)
         for n, s in values.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "conv.onnx"
    onnx.save(wrap_network(model, nets.facts()), path)
    return path


def test_biases_and_what_lies_between_the_layers(tmp_path):
    path, target = biased(tmp_path), tmp_path / "int8.onnx"

    def quantized(**words):
        found = quantize_static(path, target, [PIXELS], **words)
        made = {n.input[0] for n in onnx.load(target).graph.node if n.op_type == "QuantizeLinear"}
        return found, made

    found, made = quantized()
    assert "int32" in found.kinds and found.heavy_quantized == 3
    assert {"b", "c", "d", "e"} <= made and "a" not in made  # the ReLU is part of its layer
    found, made = quantized(quantize_bias=False, scheme="s8s8")
    assert found.kinds == ("int8",)
    found, made = quantized(glue=False)
    assert found.heavy_quantized == 3 and "e" not in made
    quantizer = Quantizer(path, [PIXELS])
    assert quantizer.has_glue and not Quantizer(path, [PIXELS], glue=False).has_glue
    assert quantizer.layers == ("conv0", "conv1", "head")


def test_layers_stay_float_by_name(source, tmp_path):
    quantizer = Quantizer(source, [PIXELS])
    assert quantizer.layers == ("layer0", "layer1", "layer2")
    found = quantizer.write(tmp_path / "int8.onnx", keep_float=["layer1"])
    assert (found.heavy, found.heavy_quantized) == (3, 2)
    graph, values = constants(tmp_path / "int8.onnx")
    assert values["w1"].dtype == np.float32 and "w0" not in values
    found = quantizer.write(tmp_path / "float.onnx", keep_float=quantizer.layers)
    assert found.heavy_quantized == found.quantize == 0
    with pytest.raises(ValueError, match="no layer is called 'layer9', expected some of layer0"):
        quantizer.write(tmp_path / "int8.onnx", keep_float=["layer9"])


def test_networks_with_norms_keep_what_lies_between_float(tmp_path):
    model = nets.network(WEIGHTS)
    model.graph.node[1].input[0] = "normed"
    model.graph.node.insert(1, nets._node("Erf", "flat", "normed", name="norm"))
    onnx.save(wrap_network(model, nets.facts()), tmp_path / "m.onnx")
    assert not Quantizer(tmp_path / "m.onnx", [PIXELS]).has_glue
    assert Quantizer(tmp_path / "m.onnx", [PIXELS], glue=True).has_glue


def test_products_without_images_become_int8(tmp_path):
    path, target = tmp_path / "m.onnx", tmp_path / "int8.onnx"
    onnx.save(wrap_network(nets.network(WEIGHTS, product="MatMul"), nets.facts()), path)
    found = quantize_dynamic(path, target)
    assert (found.heavy, found.heavy_quantized) == (3, 3)
    truth = nets.softmax(nets.outputs(PIXELS, WEIGHTS))
    got = open_session(target).run(None, {"images": PIXELS})[0]
    assert 1e-6 < np.abs(got - truth).max() < 0.1
    onnx.save(wrap_network(nets.network(WEIGHTS), nets.facts()), path)
    with pytest.raises(ValueError, match="no product with a weight"):
        quantize_dynamic(path, target)


def test_what_cannot_be_quantized(source, tmp_path, capfd):
    for words, message in (
        ({"method": "best"}, "method is 'best', expected one of minmax, entropy, percentile"),
        ({"scheme": "u4"}, "scheme is 'u4', expected one of u8s8, s8s8"),
    ):
        with pytest.raises(ValueError, match=message):
            Quantizer(source, [PIXELS], **words)
    for batches in ([], [PIXELS[:0]]):
        with pytest.raises(ValueError, match="no calibration images"):
            Quantizer(source, batches)
    with pytest.raises(FileNotFoundError):
        Quantizer(tmp_path / "none.onnx", [PIXELS])
    model = nets.network(WEIGHTS[:1])
    model.graph.node[1].CopyFrom(nets._node("ReduceMax", "flat", "logits", axes=[1]))
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        Quantizer(model, [nets.normalised(PIXELS).astype(np.float32)])
    with pytest.raises(FileNotFoundError):
        qdq_facts(tmp_path / "none.onnx")
    Quantizer(source, [PIXELS], method="entropy").write(tmp_path / "int8.onnx")
    assert capfd.readouterr() == ("", "")  # quiet
