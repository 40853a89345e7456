"""Exported files give torch's logits and torch's decisions, in float32 and close to it in int8."""

import json

import numpy as np
import pytest
import torch

from gfnet_dynn.models import GFNet, GFNetDynn
from gfnet_dynn.models.exit_policy import ExitPolicy

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gfnet_dynn import export, quantization  # noqa: E402

pytestmark = pytest.mark.slow  # each export takes seconds


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = GFNet(img_size=32, patch_size=8, num_classes=5, embed_dim=32, depth=3)
    model = GFNetDynn(backbone, (0, 1), gate_init="torch")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(40, 3, 32, 32)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def student(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    model.backbone.set_filter("fft")  # the file must not depend on the form the model runs in
    export.export_student(model.backbone, path)
    model.backbone.set_filter("auto")
    return path


@pytest.fixture(scope="module")
def chain(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a chain")  # a blank in the path
    export.export_early_exit(model, folder, policy=ExitPolicy("max_prob", 0.6))
    return folder


def test_student_is_matrix_products_only_and_gives_torchs_logits(model, student, images):
    operators = {node.op_type for node in onnx.load(str(student)).graph.node}
    assert "MatMul" in operators and not operators & {"DFT", "STFT"}
    run = export.session(student)
    with torch.no_grad():
        truth = model.backbone(torch.from_numpy(images)).numpy()
    for n in (1, 7, 40):
        (got,) = run.run(None, {"image": images[:n]})
        assert np.abs(got - truth[:n]).max() < 1e-5 * np.abs(truth).max()


def test_fft_form_writes_dft_nodes(model, tmp_path):
    with pytest.raises(ValueError, match="got 17, expected at least 20"):
        export.export_student(model.backbone, tmp_path / "x.onnx", filter="fft", opset=17)
    export.export_student(model.backbone, tmp_path / "x.onnx", filter="fft")
    graph = onnx.load(str(tmp_path / "x.onnx"))
    assert sum(node.op_type == "DFT" for node in graph.graph.node) >= 2 * 3
    assert graph.opset_import[0].version >= 20


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_any_opset_is_written_as_asked(model, images, tmp_path, opset):
    export.export_student(model.backbone, tmp_path / "x.onnx", opset=opset)
    graph = onnx.load(str(tmp_path / "x.onnx"))
    assert [o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")] == [opset]
    with torch.no_grad():
        truth = model.backbone(torch.from_numpy(images)).numpy()
    (got,) = export.session(tmp_path / "x.onnx").run(None, {"image": images})
    assert np.abs(got - truth).max() < 1e-5 * np.abs(truth).max()


@pytest.mark.parametrize("opset", [13, 17])
def test_a_chain_of_an_old_opset_decides_alike(model, images, tmp_path, opset):
    export.export_early_exit(model, tmp_path, opset=opset)
    for index in range(3):
        graph = onnx.load(str(tmp_path / f"segment{index}.onnx"))
        assert [o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")] == [opset]
    for kind in ("gate", "margin"):
        policy = quantile_policy(kind, model, images)
        truth = model.early_exit(torch.from_numpy(images), policy)
        logits, exit_index = export.OnnxEarlyExit(tmp_path).run(images, policy)
        assert np.array_equal(exit_index, truth.exit_index.numpy())
        assert np.abs(logits - truth.logits.numpy()).max() < 1e-4


def test_opsets_that_cannot_be_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="opset: got 12, expected at least 13"):
        export.export_student(model.backbone, tmp_path / "x.onnx", opset=12)
    with pytest.raises(ValueError, match="opset: got 12, expected at least 13"):
        export.export_early_exit(model, tmp_path, opset=12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_int8_student(model, student, images, tmp_path, method):
    report = quantization.quantize_student(
        student, tmp_path / "q.onnx", images=images, method=method
    )
    assert report["quantized_layers"] == 6  # fc1 and fc2 of three blocks; no filter, no head
    assert report["relative_error"] < 0.03 and report["top1_agreement"] >= 0.95
    assert report["int8_bytes"] < report["float_bytes"]
    with torch.no_grad():
        labels = model.backbone(torch.from_numpy(images)).argmax(1).numpy()
    report = quantization.accuracy_report(student, tmp_path / "q.onnx", images, labels)
    assert report["float_accuracy"] == 1.0
    assert report["int8_accuracy"] == report["top1_agreement"]


def quantile_policy(kind, model, images):
    with torch.no_grad():
        out = model(torch.from_numpy(images))
    scores = ExitPolicy(kind).scores(*out).double()
    first = scores[:, 0].quantile(0.6).item()
    second = scores[scores[:, 0] < first][:, 1].quantile(0.5).item()
    return ExitPolicy(kind, [first + 1e-4, second + 1e-4])


@pytest.mark.parametrize("kind", ["gate", "jei", "max_prob", "entropy", "margin", "patience"])
def test_chain_decides_as_torch_does(model, chain, images, kind):
    policy = ExitPolicy(kind, 1) if kind == "patience" else quantile_policy(kind, model, images)
    runner = export.OnnxEarlyExit(chain)
    truth = model.early_exit(torch.from_numpy(images), policy)
    assert len(set(truth.exit_index.tolist())) > 1
    for n in (1, 9, 40):
        logits, exit_index = runner.run(images[:n], policy)
        assert np.array_equal(exit_index, truth.exit_index[:n].numpy())
        assert np.abs(logits - truth.logits[:n].numpy()).max() < 1e-4
    assert runner.run(images[:0], policy).logits.shape == (0, 5)


def test_chain_runs_only_who_is_left(model, chain, images):
    runner = export.OnnxEarlyExit(chain)
    assert runner.policy == ExitPolicy("max_prob", 0.6) and runner.facts["exits"] == [0, 1]
    rows = []

    class Watched:
        def __init__(self, inner):
            self.inner = inner

        def run(self, outputs, feed):
            rows.append(len(next(iter(feed.values()))))
            return self.inner.run(outputs, feed)

    runner.sessions = [Watched(s) for s in runner.sessions]
    policy = quantile_policy("max_prob", model, images)
    exit_index = runner.run(images, policy).exit_index
    assert rows == [40, int((exit_index > 0).sum()), int((exit_index > 1).sum())]
    rows.clear()
    runner.run(images, ExitPolicy("max_prob", 0.0))
    assert rows == [40]


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_int8_chain_decides_nearly_alike(model, chain, images, tmp_path, method):
    import shutil

    shutil.copytree(chain, tmp_path / "q")
    names = [f"segment{i}.onnx" for i in range(3)]
    quantization.quantize_segments(tmp_path / "q", names, method=method, images=images)
    policy = quantile_policy("max_prob", model, images)
    exact = export.OnnxEarlyExit(chain).run(images, policy)
    rounded = export.OnnxEarlyExit(tmp_path / "q").run(images, policy)
    assert (exact.exit_index == rounded.exit_index).mean() >= 0.9
    assert (exact.logits.argmax(1) == rounded.logits.argmax(1)).mean() >= 0.9
    for name in names:
        types = {t.data_type for t in onnx.load(str(tmp_path / "q" / name)).graph.initializer}
        assert onnx.TensorProto.INT8 in types


def test_bad_requests_and_broken_chains_are_one_line_errors(model, chain, images, tmp_path):
    with pytest.raises(ValueError, match="got no calibration images"):
        export.export_early_exit(model, tmp_path, int8="static")
    with pytest.raises(ValueError, match="got 'half', expected one of"):
        export.export_early_exit(model, tmp_path, int8="half")
    with pytest.raises(ValueError, match="got 3 thresholds"):
        export.export_early_exit(model, tmp_path, policy=ExitPolicy("gate", [0.5] * 3))
    with pytest.raises(ValueError, match="got 'half', expected one of"):
        quantization.quantize_file(chain / "segment0.onnx", tmp_path / "x.onnx", method="half")
    with pytest.raises(FileNotFoundError, match="expected an existing file"):
        export.OnnxEarlyExit(tmp_path)
    runner = export.OnnxEarlyExit(chain)
    with pytest.raises(ValueError, match=r"expected \(N, 3, 32, 32\)"):
        runner.run(images[:, :, :31])
    runner.policy = None
    with pytest.raises(ValueError, match="expected an ExitPolicy"):
        runner.run(images)
    facts = json.loads((chain / "chain.json").read_text())
    for text, message in (
        ("{", "is not JSON"),
        (json.dumps(facts | {"version": 9}), "has no version"),
        (json.dumps({"version": 1}), "lacks"),
    ):
        (tmp_path / "chain.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            export.OnnxEarlyExit(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "chain.json").write_text(json.dumps(facts))
    with pytest.raises(FileNotFoundError, match="segment0.onnx"):
        export.OnnxEarlyExit(tmp_path)
