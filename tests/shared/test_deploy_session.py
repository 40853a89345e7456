"""One way to open an ONNX file: exact int8 sums where they are not, and only there."""

import ast
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny

from shared_core.deploy import session as sessions
from shared_core.deploy.facts import ModelError
from shared_core.deploy.session import facts_in, holds_int8, open_session, sums_overflow, this_cpu

pytest.importorskip("onnxruntime")
AVX2 = frozenset({"sse4_1", "avx", "avx2"})
AVX512 = AVX2 | {"avx512f", "avx512bw"}


def test_which_processors_need_the_exact_kernels():
    assert sums_overflow(AVX2) and sums_overflow(AVX512)
    assert not sums_overflow(AVX512 | {"avx512_vnni"}) and not sums_overflow(AVX2 | {"avx_vnni"})
    assert not sums_overflow(frozenset({"sse4_1"})) and not sums_overflow(frozenset())


def integers(path, *, rows: int = 64):
    """Products of 255 and 127: two of them together leave 16 bits. QDQ, as the quantizer writes."""
    weight = np.full((rows, 8), 127, np.int8)
    weight[:, ::2] = -127
    nodes = [
        tiny._node("QuantizeLinear", "x one zero", "q"),
        tiny._node("DequantizeLinear", "q one zero", "dq"),
        tiny._node("DequantizeLinear", "w one wzero", "dw"),
        tiny._node("MatMul", "dq dw", "product"),
        tiny._node("QuantizeLinear", "product big middle", "qy"),
        tiny._node("DequantizeLinear", "qy big middle", "y"),
    ]
    values = {
        "w": weight, "one": np.float32(1), "zero": np.uint8(0), "wzero": np.int8(0),
        "big": np.float32(rows * 255), "middle": np.uint8(128),
    }  # fmt: skip
    tiny.make_onnx(path, nodes, [tiny._value("x", "FLOAT", "N", rows)],
                   [tiny._value("y", "FLOAT", "N", 8)], values)  # fmt: skip
    return weight


@pytest.mark.parametrize("flags", [AVX2, AVX512, None])  # None: what this processor needs
def test_int8_sums_are_exact(tmp_path, flags):
    weight = integers(tmp_path / "int8.onnx")
    x = np.full((5, 64), 255, np.float32)
    used = open_session(tmp_path / "int8.onnx", cpu_flags=flags)
    truth = np.round(x.astype(np.int64) @ weight.astype(np.int64) / (64 * 255)) * 64 * 255
    np.testing.assert_array_equal(used.run(None, {"x": x})[0], truth)


def asked(session) -> bool:
    try:
        options = session.get_session_options()
        return options.get_session_config_entry("session.x64quantprecision") == "1"
    except RuntimeError:  # it has no such entry
        return False


@pytest.mark.parametrize(
    ("flags", "int8", "wanted"),
    [
        (AVX2, True, True),
        (AVX512, True, True),
        (AVX512, False, False),
        (AVX512 | {"avx512_vnni"}, True, False),
        (AVX2 | {"avx_vnni"}, True, False),
        (frozenset(), True, False),
    ],
)
def test_exact_kernels_are_asked_for_int8_files_on_such_processors(tmp_path, flags, int8, wanted):
    path = tmp_path / "model.onnx"
    if int8:
        integers(path)
    else:
        tiny.save_model(tmp_path)
    for source in (path, path.read_bytes()):
        assert holds_int8(source) is int8
        assert asked(open_session(source, cpu_flags=flags)) is wanted


def test_this_processor_is_asked_where_nothing_is_said(tmp_path, monkeypatch):
    integers(tmp_path / "int8.onnx")
    for flags in (AVX2, AVX2 | {"avx_vnni"}):
        monkeypatch.setattr(sessions, "this_cpu", lambda flags=flags: flags)
        assert asked(open_session(tmp_path / "int8.onnx")) is sums_overflow(flags)


def test_other_processors_than_x86_are_not_read(monkeypatch):
    this_cpu.cache_clear()
    monkeypatch.setattr(sessions.platform, "machine", lambda: "aarch64")
    assert this_cpu() == frozenset()
    this_cpu.cache_clear()


def test_threads_facts_and_what_cannot_be_opened(tmp_path):
    tiny.save_model(tmp_path)
    path = tmp_path / "model.onnx"
    session = open_session(path, threads=2)
    assert session.get_session_options().intra_op_num_threads == 2
    assert open_session(path).get_session_options().intra_op_num_threads == 1
    assert facts_in(session, where=path) == tiny.make_facts()
    integers(tmp_path / "bare.onnx")
    assert facts_in(open_session(tmp_path / "bare.onnx"), where="bare") is None
    with pytest.raises(FileNotFoundError, match="none.onnx does not exist"):
        open_session(tmp_path / "none.onnx")
    for content in (b"", b"no model", path.read_bytes()[:-40]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ModelError, match="bad.onnx: ONNX Runtime cannot open it") as caught:
            open_session(tmp_path / "bad.onnx")
        assert "\n" not in str(caught.value)
        assert not holds_int8(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "expected cpu, cuda, cuda:N or auto"),
        ("cuda:x", "expected cpu"),
        ("cpu:1", "expected"),
    ],
)
def test_devices_that_make_no_sense(tmp_path, device, message):
    tiny.save_model(tmp_path)
    with pytest.raises(ModelError, match=message):
        open_session(tmp_path / "model.onnx", device=device)


def test_a_gpu_is_used_or_refused(monkeypatch):
    cpu, both = ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert sessions._providers("auto", cpu) == sessions._providers("cpu", both) == cpu
    for name, number in (("cuda", 0), ("cuda:1", 1), ("auto", 0)):
        first, second = sessions._providers(name, both)
        assert first == ("CUDAExecutionProvider", {"device_id": number}) and [second] == cpu
    with pytest.raises(ModelError, match="device cuda:1: this ONNX Runtime has no CUDA"):
        sessions._providers("cuda:1", cpu)


def test_nothing_else_opens_an_onnx_file():
    root = Path(sessions.__file__).parents[3]
    files = [
        path for part in ("packages", "shared", "tools") for path in (root / part).rglob("*.py")
    ]
    assert len(files) > 100
    found = [path for path in files if _opens_a_session(path)]
    assert [path.name for path in found] == ["session.py"], found


def _opens_a_session(path):
    """In code of ours: not in the text of a snippet, nor where a benchmark does as users do."""
    text = path.read_text(encoding="utf-8")
    if "InferenceSession(" not in text or path.parent.name == "bench":
        return False
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return any(
        getattr(call, "attr", getattr(call, "id", "")) == "InferenceSession" for call in calls
    )
