"""ONNX Runtime's int8: a graph whose zero points are 0, that computes what NumPy says it holds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpkd.quant.layers import fold_batch_norms
from mpkd.quant.ort_int8 import check_qdq, ort_int8, run_onnx
from shared_core.for_torch.export import export_onnx


@pytest.fixture(scope="session")
def float_file(mpkd_digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("ort") / "float.onnx"
    export_onnx(fold_batch_norms(mpkd_digits.net), path, input_size=(3, 16, 16))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_int8_loses_little_and_is_ready_for_tensorrt(mpkd_digits, float_file, tmp_path, bias):
    target = tmp_path / "int8.onnx"
    images = mpkd_digits.calibration.numpy()
    facts = ort_int8(float_file, target, images, quantize_bias=bias)
    assert facts == check_qdq(target)
    assert facts.heavy == facts.heavy_quantized == 4
    assert facts.kinds == (("int32", "int8") if bias else ("int8",))
    logits = run_onnx(target, mpkd_digits.val_images.numpy(), threads=1)
    accuracy = float((logits.argmax(1) == mpkd_digits.val_labels.numpy()).mean())
    assert accuracy >= mpkd_digits.accuracy - 0.02
    exact = mpkd_digits.net(mpkd_digits.val_images).detach().numpy()
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1  # int8 and not the float file
    # Weights are stored as integers, by channel, and rebuild the float weight to half a step.
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(target)).graph.initializer}
    quantized = [v for v in held.values() if v.dtype == np.int8 and v.ndim == 4]
    assert len(quantized) == 3
    folded = fold_batch_norms(mpkd_digits.net).state_dict()
    for name in ("features.0.0.weight", "features.1.0.weight", "features.2.0.weight"):
        weight = folded[name].numpy()
        stored = next(v for v in quantized if v.shape == weight.shape)
        step = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
        assert np.abs(stored * step[:, None, None, None] - weight).max() <= 0.51 * step.max()


@pytest.mark.slow
def test_what_does_not_fit_is_refused(mpkd_digits, float_file, tmp_path):
    images = mpkd_digits.calibration.numpy()
    with pytest.raises(FileNotFoundError, match="no such file"):
        ort_int8(tmp_path / "none.onnx", tmp_path / "x.onnx", images)
    with pytest.raises(ValueError, match="expected one of minmax"):
        ort_int8(float_file, tmp_path / "x.onnx", images, method="best")
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        ort_int8(float_file, tmp_path / "x.onnx", images[:0])
    with pytest.raises(ValueError, match="expected a quantized graph"):
        check_qdq(float_file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_qdq(tmp_path / "none.onnx")
    assert not (tmp_path / "x.onnx").exists()


def graph(tmp_path, *, zero=0, kind=np.int8, scale=0.1, weight_too=True):
    """x -> Q -> DQ -> MatMul with a weight that is dequantized or not."""
    constants = {
        "s": np.float32(scale), "z": kind(zero), "w": np.ones((2, 2), np.float32),
        "wq": np.ones((2, 2), np.int8), "ws": np.float32(0.5), "wz": np.int8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="weight"),
        helper.make_node("MatMul", ["d", "wd" if weight_too else "w"], ["y"], name="product"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
    made = helper.make_model(
        helper.make_graph(
            nodes, "g", values[:1], values[1:],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    path = tmp_path / "g.onnx"
    onnx.save(made, str(path))
    return path


def test_the_check_sees_what_is_wrong_in_a_graph(tmp_path):
    facts = check_qdq(graph(tmp_path))
    assert (facts.quantize, facts.dequantize, facts.heavy, facts.kinds) == (1, 2, 1, ("int8",))
    with pytest.raises(ValueError, match="zero point 3, expected 0"):
        check_qdq(graph(tmp_path, zero=3))
    with pytest.raises(ValueError, match="is uint8, expected int8"):
        check_qdq(graph(tmp_path, kind=np.uint8))
    with pytest.raises(ValueError, match="not positive"):
        check_qdq(graph(tmp_path, scale=0.0))
    with pytest.raises(ValueError, match="'product' computes in float"):
        check_qdq(graph(tmp_path, weight_too=False))
    answer = run_onnx(graph(tmp_path), np.array([[0.32, 1.0]], np.float32))
    np.testing.assert_allclose(answer, [[0.5 * (0.3 + 1.0)] * 2], rtol=1e-5)
