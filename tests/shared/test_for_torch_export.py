"""ONNX files that give the numbers of the model, or none at all."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from torch import nn  # noqa: E402

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


@pytest.mark.slow
def test_export_and_check(tmp_path):
    torch.manual_seed(0)
    model, path = TwoHeads(), tmp_path / "m.onnx"
    model(torch.rand(4, 3, 8, 8))  # statistics other than 0 and 1; stays in training mode
    found = export_onnx(
        model, path, input_size=(3, 8, 8), output_names=["logits", "features"], seed=3
    )
    assert model.training
    assert 0 <= found.max_abs < 1e-5
    assert 0 <= found.max_rel < 1e-5
    proto = onnx.load(path)  # one file: weights inside
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert proto.graph.input[0].name == "image"
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [o.name for o in proto.graph.output] == ["logits", "features"]

    # an independent batch, of a size that the export never saw; and a truth that is wrong
    model.eval()
    batch = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        truth = [o.numpy() for o in model(torch.from_numpy(batch))]
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

    # above the tolerance: the old file stays
    old = path.read_bytes()
    with pytest.raises(ExportError, match="expected at most"):
        export_onnx(
            model,
            path,
            input_size=(3, 8, 8),
            output_names=["logits", "features"],
            tolerance=-1.0,
        )
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert export_onnx(
        model, path, input_size=(3, 8, 8), output_names=["a", "b"], check_batches=()
    ) == Difference(0.0, 0.0)
