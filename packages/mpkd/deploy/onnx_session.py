"""ONNX Runtime on the CPU, with int8 sums that do not overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def onnx_session(path: str | Path, *, threads: int = 0) -> Any:
    """An inference session of an ONNX file.

    A processor with AVX2 or AVX-512 but without VNNI adds two products of 8-bit numbers in 16
    bits, where they overflow: classes change. There this asks for the slower exact kernels; on
    other processors the setting has no effect.

    Args:
        threads: of the runtime; 0 = its own choice.

    Raises:
        ImportError: the package onnxruntime is not installed.

    Source: ONNX Runtime, onnxruntime_session_options_config_keys.h, session.x64quantprecision.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "onnxruntime is not installed: pip install './packages/mpkd[export]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
