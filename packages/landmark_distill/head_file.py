"""The shared head as a file of its own: written once with unit rows, mapped by every process."""

from __future__ import annotations

import json
import mmap as _mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landmark_distill.cosine_head import MARGIN, ROWS, SCALE, TINY, CosineMarginHead
from shared_core.checkpoints import atomic_write

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_HEADER = 10_000_000  # bytes; a longer header is no header


def save_head(
    path: str | Path, head: CosineMarginHead, *, dtype: torch.dtype | None = None
) -> None:
    """Write a head as safetensors with unit rows, scale and margin; a part at a time, atomically.

    Unit rows give the same logits and spare their norms while training.

    Args:
        path: the file, ``*.safetensors``.
        head: any number of classes.
        dtype: float64, float32, float16 or bfloat16; None for the weight's own.

    Raises:
        ValueError: another suffix or dtype.
    """
    path, weight = Path(path), head.weight.detach()
    dtype = dtype or weight.dtype
    if path.suffix != ".safetensors" or dtype not in _NAMES:
        raise ValueError(f"{path} as {dtype}: expected *.safetensors and one of {list(_NAMES)}")
    size = weight.numel() * torch.empty(0, dtype=dtype).element_size()
    entry = {"dtype": _NAMES[dtype], "shape": list(weight.shape), "data_offsets": [0, size]}
    about = {"scale": repr(head.scale), "margin": repr(head.margin), "rows": "unit"}
    header = json.dumps({"__metadata__": about, "head.weight": entry}).encode()
    header += b" " * (-len(header) % 64)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for part in weight.split(ROWS):
                part = part.to(device="cpu", dtype=wide)
                part = part / part.norm(dim=1, keepdim=True).clamp_min(TINY)
                file.write(part.to(dtype).contiguous().view(torch.uint8).numpy().data)

    atomic_write(path, write)


def head_from_file(
    path: str | Path,
    *,
    mmap: bool = True,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    margin: float | None = None,
) -> CosineMarginHead:
    """A frozen head from a file; with ``mmap`` its rows stay there until they are read.

    Args:
        path: ``*.safetensors`` (of :func:`save_head`, or with a tensor whose name ends in
            ``head.weight``), ``*.npy``, or a torch checkpoint with such a tensor, maybe inside
            ``model_state``, ``state_dict``, ``params`` or ``model``.
        mmap: read on demand, shared between processes, never written back. Not with ``dtype``.
        dtype: convert, which reads it all.
        scale: None for the file's own, else that of the recipe.
        margin: likewise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no head in it, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a head")
    about: dict[str, str] = {}
    if path.suffix == ".safetensors":
        weight, about = _safetensors(path)
    elif path.suffix == ".npy":
        try:
            weight = torch.from_numpy(np.load(path, mmap_mode="c"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: is not a head, expected a float array (C, D)") from error
    else:
        weight = _checkpoint(path)
    if dtype is not None:
        weight = weight.to(dtype)
    elif not mmap:
        weight = weight.clone()
    return CosineMarginHead.around(
        weight,
        scale=float(about.get("scale", SCALE)) if scale is None else scale,
        margin=float(about.get("margin", MARGIN)) if margin is None else margin,
    )


def _safetensors(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The mapped head weight, and the file's metadata."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _HEADER):
                raise ValueError("header length")
            header = json.loads(file.read(length))
        names = [name for name in header if name == "weight" or name.endswith("head.weight")]
        entry = header[names[0]]
        begin, end = entry["data_offsets"]
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        bytes_wanted = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
        if end - begin != bytes_wanted or 8 + length + end > size or len(shape) != 2:
            raise ValueError("sizes")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path}: holds no head, expected safetensors with a whole 'head.weight' (C, D)"
        ) from error
    offset = 8 + length + begin
    # Copy-on-write: torch wants memory that may be written, and the file must never be.
    start = offset // _mmap.ALLOCATIONGRANULARITY * _mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        mapped = _mmap.mmap(file.fileno(), offset + end - begin - start, access=_mmap.ACCESS_COPY,
                            offset=start)  # fmt: skip
    flat = torch.frombuffer(mapped, dtype=dtype, offset=offset - start, count=int(np.prod(shape)))
    about = header.get("__metadata__", {})
    return flat.view(shape), about if isinstance(about, dict) else {}


def _checkpoint(path: Path) -> Tensor:
    """The head weight of a torch checkpoint; nothing in it is executed."""
    import pickle

    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{path}: cannot be read as torch weights: {error}".split("\n")[0]
        ) from error
    for key in ("model_state", "state_dict", "params", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    names = [n for n in state if n.endswith("head.weight")] if isinstance(state, dict) else []
    if not names:
        raise ValueError(f"{path}: holds no head, expected a tensor named ...head.weight")
    return state[names[0]]
