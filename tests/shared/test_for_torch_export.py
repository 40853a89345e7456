"""ONNX files that give the numbers of the model, or none at all; and wrapped, of the formula."""

import float_networks as nets
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from torch import nn  # noqa: E402

from shared_core.deploy.graph import wrap_network  # noqa: E402
from shared_core.deploy.session import open_session  # noqa: E402
from shared_core.for_torch.export import (  # noqa: E402
    Difference,
    ExportError,
    check_onnx,
    export_onnx,
)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        features = self.body(x).mean(dim=(2, 3))
        return self.head(features), features


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = TwoHeads()
    made(torch.rand(4, 3, 8, 8))  # statistics other than 0 and 1; stays in training mode
    return made


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("two heads") / "m.onnx"
    return path, export_onnx(
        model, path, input_size=(3, 8, 8), output_names=["logits", "features"], seed=3
    )


def test_export_and_check(model, exported):
    path, found = exported
    assert model.training
    assert 0 <= found.max_abs < 1e-5
    assert 0 <= found.max_rel < 1e-5
    proto = onnx.load(path)  # one file: weights inside
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]
    assert proto.graph.input[0].name == "image"
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [o.name for o in proto.graph.output] == ["logits", "features"]

    # an independent batch, of a size that the export never saw; and a truth that is wrong
    batch = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)
    model.eval()
    with torch.no_grad():
        truth = [o.numpy() for o in model(torch.from_numpy(batch))]
    model.train()
    assert check_onnx(path, [batch], [truth]).max_rel < 1e-5
    shifted = [truth[0] + 0.01, truth[1]]
    with pytest.raises(ExportError, match="ONNX Runtime differs by .* expected at most 1e-04"):
        check_onnx(path, [batch], [shifted])
    wanted = 0.01 / np.abs(shifted[0]).max()
    loose = check_onnx(path, [batch], [shifted], tolerance=1.0)
    assert loose.max_abs == pytest.approx(0.01, rel=1e-3)
    assert loose.max_rel == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ExportError, match="outputs have shapes"):
        check_onnx(path, [batch], [truth[:1]])
    with pytest.raises(ExportError, match="differs by nan"):
        check_onnx(path, [batch], [[truth[0] * np.nan, truth[1]]])


def test_above_the_tolerance_the_old_file_stays(model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    words = {"input_size": (3, 8, 8), "output_names": ["a", "b"], "opset": 17}
    with pytest.raises(ExportError, match="expected at most"):
        export_onnx(model, path, tolerance=-1.0, **words)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert export_onnx(model, path, check_batches=(), **words) == Difference(0.0, 0.0)
    with pytest.raises(ValueError, match="opset is 12, expected 13 or more"):
        export_onnx(model, path, input_size=(3, 8, 8), opset=12)


@pytest.mark.parametrize("opset", [13, 17, None, 20])
def test_what_torch_writes_can_be_wrapped(tmp_path, opset):
    weights = nets.layers(5, 3)
    linear = [nn.Linear(*w.shape) for w in weights]
    for layer, weight in zip(linear, weights, strict=True):
        layer.weight.data = torch.from_numpy(weight.T.copy())
        layer.bias.data.zero_()
    model = nn.Sequential(nn.Flatten(), linear[0], nn.ReLU(), linear[1])
    path = tmp_path / "m.onnx"
    export_onnx(model, path, input_size=(3, *nets.SIZE), input_name="images", opset=opset)
    written = next(o.version for o in onnx.load(path).opset_import if o.domain == "")
    assert opset in (None, written)
    model = wrap_network(path, nets.facts())
    content = model.SerializeToString()
    assert [n.name for n in model.graph.node if n.op_type == "Gemm"] == ["1", "3"]  # as in torch
    # Neither the code's places nor the exporter's notes on them.
    assert b"site-packages" not in content and b"pkg.torch" not in content
    session = open_session(content)
    for count in (1, 6):
        pixels = nets.images(count)
        truth = nets.softmax(nets.outputs(pixels, weights))
        np.testing.assert_allclose(session.run(None, {"images": pixels})[0], truth, atol=1e-6)


def test_a_later_segment_takes_tokens(tmp_path):
    model, path = nn.Linear(4, 3), tmp_path / "segment1.onnx"
    export_onnx(model, path, input_size=(7, 4), input_name="tokens_in", opset=17)
    (taken,) = onnx.load(path).graph.input
    assert taken.name == "tokens_in"
    assert [d.dim_value for d in taken.type.tensor_type.shape.dim] == [0, 7, 4]
