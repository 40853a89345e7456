"""NNCF's int8 in OpenVINO: little is lost, and without the extra one line says what is missing."""

from __future__ import annotations

import sys
from importlib import util

import pytest
import torch

from mpkd.quant.nncf_int8 import nncf_int8, quantised_operations, run_openvino

ABSENT = [name for name in ("nncf", "openvino") if util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
def test_int8_loses_little(mpkd_digits, tmp_path, monkeypatch):
    monkeypatch.setenv("NNCF_CI", "1")
    path = nncf_int8(mpkd_digits.net, tmp_path / "int8.xml", mpkd_digits.calibration[:64])
    assert path.is_file() and path.with_suffix(".bin").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.bin", "int8.xml"]
    # One at each of the four layers at least: the graph is quantized.
    assert quantised_operations(path).get("FakeQuantize", 0) >= 4
    logits = run_openvino(path, mpkd_digits.val_images.numpy(), threads=1)
    accuracy = float((logits.argmax(1) == mpkd_digits.val_labels.numpy()).mean())
    assert accuracy >= mpkd_digits.accuracy - 0.02


def test_without_the_extra_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ValueError, match=r"not installed.*/packages/mpkd\[openvino\]'"):
        nncf_int8(torch.nn.Identity(), tmp_path / "x.xml", torch.zeros(1, 3, 8, 8))


def test_what_does_not_fit_is_refused(tmp_path):
    net = torch.nn.Identity()
    with pytest.raises(ValueError, match="ends in .xml"):
        nncf_int8(net, tmp_path / "x.onnx", torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        nncf_int8(net, tmp_path / "x.xml", torch.zeros(0, 3, 8, 8))
