"""Seed Paddle and save or restore every random state of a process, as plain values."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle

from shared_core.runs.seeds import seed_python_numpy


def seed_all(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and Paddle. For entry scripts, never for libraries.

    Python's generator matters here: ``paddle.vision.transforms`` draws from it.

    Args:
        seed: in ``[0, 2**32)``.
        deterministic: also make Paddle's GPU kernels deterministic; a CPU's are.

    Raises:
        ValueError: the seed is out of range.
    """
    seed_python_numpy(seed)
    paddle.seed(seed)
    if deterministic and paddle.device.is_compiled_with_cuda():
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})


def capture_rng() -> dict[str, Any]:
    """The state of Python's, NumPy's and Paddle's global generators, as arrays and plain values."""
    version, internal, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), np.array(words), int(position), int(has_gauss), float(cached)],
        "paddle": [_plain(one) for one in paddle.get_rng_state("cpu")],
        "gpu": [_plain(one) for one in paddle.get_rng_state()] if _on_gpu() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Continue with the random numbers that would have come after :func:`capture_rng`.

    Devices that this machine does not have are passed over.

    Raises:
        ValueError: no state of :func:`capture_rng`.
    """
    try:
        version, internal, gauss = state["python"]
        name, words, position, has_gauss, cached = state["numpy"]
        cpu, gpu = state["paddle"], state["gpu"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("random state is incomplete, expected that of capture_rng") from error
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, words, position, has_gauss, cached))
    paddle.set_rng_state([_opaque(one) for one in cpu], "cpu")
    if _on_gpu() and gpu:
        paddle.set_rng_state([_opaque(one) for one in gpu])


def _on_gpu() -> bool:
    return str(paddle.device.get_device()).startswith("gpu")


def _plain(state: Any) -> list[Any]:
    """Paddle's own state object pickles as four plain values: device, seed, offset, engine."""
    device, seed, offset, engine = state.__getstate__()
    return [device, seed, offset, list(engine)]


def _opaque(values: list[Any]) -> Any:
    kind: Any = type(paddle.get_rng_state("cpu")[0])
    state = kind.__new__(kind)
    state.__setstate__(tuple(values))
    return state
