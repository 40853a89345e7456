"""Seed torch and save or restore every random state of a process, as plain values."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from shared_core.runs.seeds import seed_python_numpy


def seed_all(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices). For entry scripts, never for libraries.

    Args:
        seed: in ``[0, 2**32)``.
        deterministic: also make torch use deterministic kernels and fail where it has none.
            On CUDA this needs ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` in the environment.

    Raises:
        ValueError: the seed is out of range.
    """
    seed_python_numpy(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def capture_rng() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(words).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
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
        cpu, cuda = state["torch"], state["cuda"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("random state is incomplete, expected that of capture_rng") from error
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(cpu)
    for device, one in enumerate(cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)
