"""Read torch's files without torch and without running what a pickle can name.

Both forms are read: the zip of today (``data.pkl`` beside one member a storage) and the old form
(a row of pickles, then the storages one behind the other). The few names that such a file needs are
answered by stand-ins of this module; any other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from shared_core.checkpoints.digest import Array
from shared_core.checkpoints.errors import CheckpointError
from shared_core.checkpoints.pickle_check import PickleRefused, check_pickle
from shared_core.checkpoints.source import readable_file

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the old form
_PROTOCOL = 1001
_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "BFloat16Storage": None,  # NumPy has none: widened to float32
}


class _Refused(Exception):
    """The file holds something else than tensors and plain containers."""


@dataclass(frozen=True)
class _StorageKind:
    name: str


@dataclass(frozen=True)
class _Storage:
    kind: _StorageKind
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _whole(*values: object) -> bool:
    return all(type(v) is int and v >= 0 for v in values)


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *_: object
) -> Any:
    if (
        not isinstance(storage, _Storage)
        or not isinstance(shape, tuple)
        or not isinstance(stride, tuple)
        or len(shape) != len(stride)
        or not _whole(offset, *shape, *stride)
    ):
        raise _Refused("a malformed tensor")
    return _Tensor(storage, int(offset), shape, stride)  # type: ignore[call-overload]


def _rebuild_parameter(tensor: object, *_: object) -> Any:
    if not isinstance(tensor, _Tensor):
        raise _Refused("a malformed parameter")
    return tensor


class _Dict(dict):  # type: ignore[type-arg]
    """An ``OrderedDict``; torch hangs a ``_metadata`` on it, which is passed over."""

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("collections", "OrderedDict"): _Dict,
        }
        if module == "torch" and name in _DTYPES:
            return _StorageKind(name)
        found = known.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}"[:80])
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise _Refused("a persistent id that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageKind) or not isinstance(key, str) or not _whole(count):
            raise _Refused("a malformed storage")
        return _Storage(kind, key, count)


def _values(data: bytes, storage: _Storage, little: bool) -> Array:
    """The numbers of a storage ``(count,)``."""
    kind = _DTYPES[storage.kind.name]
    order: Literal["<", ">"] = "<" if little else ">"
    size = 2 if kind is None else np.dtype(kind).itemsize
    if len(data) != storage.count * size:
        raise _Refused("a storage whose size is not that of its data")
    if kind is None:
        wide = np.frombuffer(data, dtype=np.dtype(np.uint16).newbyteorder(order)).astype(np.uint32)
        return (wide << 16).view(np.float32)
    raw = np.frombuffer(data, dtype=np.dtype(kind).newbyteorder(order))
    return raw.astype(raw.dtype.newbyteorder("="))


def _array(tensor: _Tensor, values: Array) -> Array:
    """A tensor's own copy of its numbers, in C order."""
    reach = tensor.offset
    if math.prod(tensor.shape):
        reach += (
            sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
        )
    if reach > len(values) or math.prod(tensor.shape) > len(values):
        raise _Refused("a tensor that reaches beyond its storage")
    steps = tuple(step * values.itemsize for step in tensor.stride)
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, steps)
    return np.array(view, order="C")


def _plain(value: Any, read: Callable[[_Storage], Array], cache: dict[str, Array]) -> Any:
    if isinstance(value, _Tensor):
        key = value.storage.key
        if key not in cache:
            cache[key] = read(value.storage)
        return _array(value, cache[key])
    if isinstance(value, dict):
        return {key: _plain(item, read, cache) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, read, cache) for item in value)
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise _Refused(f"a {type(value).__name__.lstrip('_')}")


def _load(file: BinaryIO) -> Any:
    check_pickle(file)
    return _Unpickler(file).load()


def _zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
        (pickled,) = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        base = pickled[: -len("data.pkl")]
        told = f"{base}byteorder"
        little = told not in names or packed.read(told) == b"little"
        content = _load(io.BytesIO(packed.read(pickled)))

        def read(storage: _Storage) -> Array:
            data = packed.read(f"{base}data/{storage.key}")
            return _values(data, storage, little)

        return _plain(content, read, {})


def _old(file: BinaryIO) -> Any:
    def plain() -> Any:
        return _load(file)

    if plain() != _MAGIC or plain() != _PROTOCOL:
        raise _Refused("no torch file's beginning")
    system = plain()
    little = system.get("little_endian", True) if isinstance(system, dict) else True
    content = plain()
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Refused("a malformed table of storages")
    kinds: dict[str, _Storage] = {}
    _collect(content, kinds)
    stored: dict[str, Array] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little" if little else "big")
        if key not in kinds or count != kinds[key].count:
            raise _Refused("a storage that no tensor has")
        kind = _DTYPES[kinds[key].kind.name]
        size = count * (2 if kind is None else np.dtype(kind).itemsize)
        stored[key] = _values(file.read(size), kinds[key], little)
    return _plain(content, lambda storage: stored[storage.key], {})


def _collect(value: Any, into: dict[str, _Storage]) -> None:
    if isinstance(value, _Tensor):
        into[value.storage.key] = value.storage
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, into)
    elif type(value) in (list, tuple):
        for item in value:
            _collect(item, into)


def read_torch(path: str | Path) -> Any:
    """Arrays and plain containers of what ``torch.save`` wrote; nothing in it is executed.

    Numbers of 16 bits in the format bfloat16 are widened to float32.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: no torch file, damaged, or it holds more than tensors and plain values.
    """
    path = readable_file(path)
    try:
        if zipfile.is_zipfile(path):
            return _zip(path)
        with path.open("rb") as file:
            return _old(file)
    except (_Refused, PickleRefused) as error:
        raise CheckpointError(
            f"{path}: refused, it holds {error}; expected tensors and plain values only"
        ) from error
    except OSError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: its containers are nested too deeply") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointError(f"{path}: no readable torch file ({type(error).__name__})") from error
