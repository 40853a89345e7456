"""One hash for a set of weights, the same whichever file or framework holds them."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.checkpoints.errors import CheckpointError

Array = NDArray[Any]


def digest(items: Iterable[tuple[str, str, tuple[int, ...], memoryview]]) -> str:
    """sha256 (hex) over ``(name, dtype name, shape, little-endian bytes)``, in order of name."""
    total = hashlib.sha256()
    for name, dtype, shape, data in sorted(items, key=lambda item: item[0]):
        total.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        total.update(data)
    return total.hexdigest()


def array_bytes(array: Array) -> memoryview:
    """The array's values as little-endian bytes in C order, without a copy where possible."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.byteorder == ">":
        flat = flat.astype(flat.dtype.newbyteorder("<"))
    values: Any = flat.view(np.uint8) if flat.size else b""
    return memoryview(values)


def weights_sha256(arrays: Mapping[str, Array]) -> str:
    """sha256 (hex) of named arrays; the same in a torch, Paddle or safetensors file."""
    return digest(
        (name, array.dtype.name, array.shape, array_bytes(array)) for name, array in arrays.items()
    )


def check_sha256(path: str | Path, facts: Mapping[str, Any], got: str) -> None:
    """``CheckpointError`` unless the weights read from ``path`` are those that were written."""
    wanted = facts.get("sha256")
    if wanted != got:
        raise CheckpointError(
            f"{path}: weights are damaged: sha256 is {got[:12]}..., expected {str(wanted)[:12]}..."
        )
