"""One reader for every file of weights: safetensors, torch's two forms, Paddle's; no framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shared_core.checkpoints import CheckpointError, neutral, plain_names
from shared_core.checkpoints.digest import Array
from shared_core.checkpoints.pickle_arrays import read_pickle, state_arrays, widened
from shared_core.checkpoints.source import readable_file
from shared_core.checkpoints.torch_arrays import read_torch
from shared_core.weights.efficientnet_lite import timm_names

_INSIDE = ("model", "state_dict", "model_state", "state_dict_ema", "model_ema")


def read_weights(path: str | Path) -> dict[str, Array]:
    """Named arrays of a file that someone publishes; nothing in it is executed.

    A state dict under ``model``, ``state_dict`` ... is found; prefixes of wrappers are taken off;
    the names of the EfficientNet-lite packages become timm's.

    Args:
        path: ``.safetensors``, ``.pth`` / ``.pt`` / ``.bin`` of torch, ``.pdparams`` of Paddle;
            told apart by content.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: hostile, damaged, or no weights in it.
    """
    path = readable_file(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        arrays = neutral.read_arrays(path)[0]
    elif path.suffix in (".pdparams", ".pdopt"):
        arrays = widened(state_arrays(path, _inside(read_pickle(path))))
    else:
        arrays = _named(path, _inside(read_torch(path)))
    renamed = plain_names(list(arrays))
    arrays = {renamed[name]: value for name, value in arrays.items()}
    if any(name.startswith("_conv_stem.") for name in arrays):
        try:
            renamed = timm_names(list(arrays))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        arrays = {renamed[name]: value for name, value in arrays.items()}
    return arrays


def _inside(content: Any) -> Any:
    if isinstance(content, dict):
        for key in _INSIDE:
            if isinstance(content.get(key), dict):
                return content[key]
    return content


def _named(path: Path, content: Any) -> dict[str, Array]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no weights, expected a dict of named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor"
            )
    return content
