"""What Paddle2ONNX writes can be wrapped and quantized like any other network's file."""

import float_networks as nets
import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
pytest.importorskip("paddle2onnx")
pytest.importorskip("onnxruntime")
from shared_core.deploy.graph import wrap_network  # noqa: E402
from shared_core.deploy.quantize import quantize_static  # noqa: E402
from shared_core.deploy.session import open_session  # noqa: E402
from shared_core.for_paddle.export import export_onnx  # noqa: E402


@pytest.mark.parametrize("opset", [13, 17])
def test_what_paddle_writes_can_be_wrapped(tmp_path, opset):
    weights = nets.layers(5, 3)
    layers = [paddle.nn.Linear(*weight.shape, bias_attr=False) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.set_value(weight)
    model = paddle.nn.Sequential(paddle.nn.Flatten(), layers[0], paddle.nn.ReLU(), layers[1])
    export_onnx(model, tmp_path / "float.onnx", input_size=(3, *nets.SIZE), opset=opset)
    wrapped = wrap_network(tmp_path / "float.onnx", nets.facts())
    session = open_session(wrapped.SerializeToString())
    for count in (1, 6):
        pixels = nets.images(count)
        truth = nets.softmax(nets.outputs(pixels, weights))
        np.testing.assert_allclose(session.run(None, {"images": pixels})[0], truth, atol=1e-6)
    found = quantize_static(wrapped, tmp_path / "int8.onnx", [nets.images(20)])
    assert found.heavy_quantized == found.heavy == 2
