"""The one way to open an ONNX file: quiet, on the threads asked for, with exact int8 sums."""

from __future__ import annotations

import mmap
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

from shared_core.deploy.facts import METADATA_KEY, ModelError, ModelFacts, facts_from_text

EXACT = "session.x64quantprecision"
_INT8_OPERATORS = (b"QuantizeLinear", b"MatMulInteger", b"ConvInteger", b"QLinear")


def open_session(
    source: str | Path | bytes,
    *,
    threads: int = 1,
    device: str = "cpu",
    cpu_flags: frozenset[str] | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    A processor with AVX2 or AVX-512 but without VNNI adds two products of 8-bit numbers in 16
    bits, where they overflow: other classes come out. There, and for int8 files alone, the slower
    exact kernels are asked for; elsewhere these would only cost time.

    Args:
        source: an ONNX file, or its bytes.
        threads: of one operator; 0 is the runtime's own choice.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU where ONNX Runtime has one.
        cpu_flags: what the processor can do; None reads it once from this machine.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package onnxruntime is not installed.
        ModelError: damaged, not ONNX, or a device that is not there.

    Source: ONNX Runtime, onnxruntime_session_options_config_keys.h, session.x64quantprecision.
    """
    name = "the ONNX model" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} does not exist, expected an ONNX file")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"onnxruntime is not installed, expected it for {name}: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    flags = this_cpu() if cpu_flags is None else cpu_flags
    if sums_overflow(flags) and holds_int8(source):
        options.add_session_config_entry(EXACT, "1")
    providers = _providers(device, onnxruntime.get_available_providers())
    content = source if isinstance(source, bytes) else str(source)
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # its own exceptions derive from no common class
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name}: ONNX Runtime cannot open it: {reason}") from None
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != first:  # it falls back to the CPU without an error
        raise ModelError(f"device {device}: ONNX Runtime cannot use it here, expected cpu")
    return session


def facts_in(session: Any, *, where: str | Path) -> ModelFacts | None:
    """The facts that an ONNX file carries in its metadata; None if it has none.

    Raises:
        ModelError: they are damaged.
    """
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return None if text is None else facts_from_text(text, where=where)


def sums_overflow(flags: frozenset[str]) -> bool:
    """Whether ONNX Runtime's usual int8 kernels may overflow on a processor with these flags."""
    return bool(flags & {"avx2", "avx512f"}) and not flags & {"avx512_vnni", "avx_vnni"}


@lru_cache(maxsize=1)
def this_cpu() -> frozenset[str]:
    """What this processor can do, by Linux' names; nothing where it is no x86 or unknown."""
    info = Path("/proc/cpuinfo")
    if platform.machine().lower() not in ("x86_64", "amd64") or not info.exists():
        return frozenset()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def holds_int8(source: str | Path | bytes) -> bool:
    """Whether an ONNX model computes in 8 bits, by the names of its operators."""
    if isinstance(source, bytes):
        return any(name in source for name in _INT8_OPERATORS)
    with open(source, "rb") as file:
        if not file.seek(0, 2):
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return any(content.find(name) >= 0 for name in _INT8_OPERATORS)


def _providers(device: str, available: list[str]) -> list[Any]:
    kind, _, number = device.partition(":")
    has_gpu = "CUDAExecutionProvider" in available
    if device == "auto":
        kind = "cuda" if has_gpu else "cpu"
    if kind == "cpu" and not number:
        return ["CPUExecutionProvider"]
    if kind != "cuda" or (number and not number.isdigit()):
        raise ModelError(f"device {device!r}, expected cpu, cuda, cuda:N or auto")
    if not has_gpu:
        raise ModelError(f"device {device}: this ONNX Runtime has no CUDA, expected cpu")
    cuda = ("CUDAExecutionProvider", {"device_id": int(number or 0)})
    return [cuda, "CPUExecutionProvider"]
