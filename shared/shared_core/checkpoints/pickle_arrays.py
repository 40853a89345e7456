"""Read Paddle's pickled files without ever running what a pickle can name.

``.pdparams`` and ``.pdopt`` are pickles of dicts, lists and NumPy arrays. A pickle may name any
function of any installed package and call it, so only the few names that such a file needs are
known here, and each of them is answered by a stand-in of this module: not even NumPy's own
constructors are called with what the file says.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.checkpoints.atomic import atomic_write
from shared_core.checkpoints.digest import Array, check_sha256, weights_sha256
from shared_core.checkpoints.errors import CheckpointError
from shared_core.checkpoints.facts import check_facts, facts_from_json, facts_to_json
from shared_core.checkpoints.pickle_check import PickleRefused, check_pickle
from shared_core.checkpoints.source import readable_file

_KINDS = "biufc"  # booleans, integers, floats, complex numbers: no objects, no text


class _Refused(Exception):
    """The pickle holds something else than arrays and plain containers."""


class _Dtype:
    """Stands in for ``numpy.dtype`` while a pickle is read."""

    def __init__(self, code: object = None, *_flags: object) -> None:
        if not isinstance(code, str) or len(code) > 8:
            raise _Refused("an array dtype that is no short name")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise _Refused("an array dtype with fields")
        self.order = str(state[1])

    def real(self) -> "np.dtype[Any]":
        """The NumPy dtype, when it is one of plain numbers."""
        try:
            dtype = np.dtype(self.code)
        except TypeError as error:
            raise _Refused(f"dtype {self.code!r}") from error
        if dtype.kind not in _KINDS:
            raise _Refused(f"dtype {self.code!r}")
        return dtype.newbyteorder(">") if self.order == ">" else dtype


class _Array:
    """Stands in for ``numpy.ndarray``; built only after the whole pickle was read."""

    def __init__(self, state: tuple[object, ...] = ()) -> None:
        self.state = state

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("a malformed array")
        _version, shape, dtype, fortran, data = state
        self.state = (data, dtype, shape, bool(fortran))

    def build(self) -> Array:
        """The array, after a look at its data, dtype and shape."""
        if not self.state:
            raise _Refused("an array without its data")
        data, dtype, shape, fortran = self.state
        if not isinstance(data, bytes | bytearray):
            raise _Refused("an array of Python objects")
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
            raise _Refused("a malformed array")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise _Refused("a malformed array shape")
        real = dtype.real()
        if math.prod(shape) * real.itemsize != len(data):
            raise _Refused("an array whose size is not that of its data")
        native = np.frombuffer(data, dtype=real).astype(real.newbyteorder("="), copy=True)
        return native.reshape(shape, order="F" if fortran else "C")


class _NdarrayName:
    """The bare name ``numpy.ndarray``, which files only pass to ``_reconstruct``."""


class _Scalar(_Array):
    """A NumPy number."""


def _reconstruct(*_args: object) -> _Array:
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    return _Array((data, dtype, shape, order == "F"))


def _scalar(dtype: object, data: object) -> _Array:
    return _Scalar((data, dtype, (), False))


def _mapping() -> dict[Any, Any]:
    return {}


def _pair(items: object) -> tuple[Any, ...]:
    """``tuple`` as Paddle uses it, for a tensor's name and value; long ones could fill memory."""
    if not isinstance(items, list | tuple) or len(items) > 8:
        raise _Refused("a malformed tuple")
    return tuple(items)


def _latin1(text: object, codec: object) -> bytes:
    """Protocol 2 writes bytes as text; only that one use of ``_codecs.encode`` is known."""
    if not isinstance(text, str) or codec != "latin1":
        raise _Refused("a codec other than latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Protocol 2 writes empty bytes as a call of ``bytes`` without arguments."""
    return b""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core.", "numpy.core.", 1)
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _NdarrayName,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy.core.multiarray", "scalar"): _scalar,
            ("numpy.core.numeric", "_frombuffer"): _frombuffer,
            ("collections", "OrderedDict"): _mapping,
            ("builtins", "tuple"): _pair,
            ("__builtin__", "tuple"): _pair,
            ("_codecs", "encode"): _latin1,
            ("builtins", "bytes"): _no_bytes,
            ("__builtin__", "bytes"): _no_bytes,
        }
        found = known.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}"[:80])
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent id")


class _Unwrap:
    """Turns stand-ins into arrays, each object once, so that a small file stays small."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget  # bytes of arrays that may still be built; None: no limit
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _KINDS:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = _Refused  # a container that is met again while it is open
            self.done[id(value)] = self._object(value)
        result = self.done[id(value)]
        if result is _Refused:
            raise _Refused("a container that contains itself")
        return result

    def _object(self, value: Any) -> Any:
        if isinstance(value, _Array):
            array = value.build()
            if self.budget is not None:
                self.budget -= array.nbytes
                if self.budget < 0:
                    raise _Refused("more array data than the file has bytes")
            return array[()] if isinstance(value, _Scalar) else array
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str | int):
                    raise _Refused(f"a dict key of type {type(key).__name__}")
            return {key: self(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self(item) for item in value)
        raise _Refused(f"a {type(value).__name__.lstrip('_')}")


def read_pickle(path: str | Path) -> Any:
    """The arrays and plain containers of a pickle; nothing in it is executed.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: truncated, or it holds anything but arrays, text, numbers, dicts, lists.
    """
    path = readable_file(path)
    try:
        with path.open("rb") as file:
            check_pickle(file)
            content = _Unpickler(file).load()
        return _Unwrap(path.stat().st_size)(content)
    except (_Refused, PickleRefused) as error:
        raise CheckpointError(
            f"{path}: refused, it holds {error}; expected arrays and plain containers only"
        ) from error
    except OSError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: its containers are nested too deeply") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path}: no readable pickle ({type(error).__name__})") from error


def state_arrays(path: str | Path, content: Any) -> dict[str, Array]:
    """The named arrays in what ``paddle.save(layer.state_dict(), path)`` wrote.

    Paddle adds a table of generated names, and stores a tensor as a ``(name, array)`` pair when it
    is nested deeper; both are undone.

    Raises:
        CheckpointError: an entry that is no array.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected named arrays")
    if "UnpackBigParamInfor@@" in content:
        raise CheckpointError(f"{path}: its arrays are split in slices; save it with protocol 4")
    arrays: dict[str, Array] = {}
    for name, value in content.items():
        if name == "StructuredToParameterName@@":
            continue
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = value[1]
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected an array"
            )
        arrays[name] = value
    return arrays


def widened(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Paddle's arrays as other frameworks read them: bfloat16 becomes float32, bit for bit.

    NumPy has no bfloat16, so Paddle stores its bits as uint16, a type that its weights never have.
    """
    return {
        name: (array.astype(np.uint32) << 16).view(np.float32)
        if array.dtype == np.uint16
        else array
        for name, array in arrays.items()
    }


def write_pickle(path: str | Path, content: Any) -> None:
    """Write arrays and plain containers so that ``paddle.load`` and :func:`read_pickle` open them.

    Raises:
        CheckpointError: something that :func:`read_pickle` would refuse.
        OSError: the file cannot be written; an older one is untouched.
    """
    try:
        plain = _Unwrap(None)(content)
    except _Refused as error:
        raise CheckpointError(f"{path}: cannot hold {error}") from error

    def save(scratch: Path) -> None:
        with scratch.open("wb") as file:
            pickle.dump(plain, file, protocol=4)

    atomic_write(path, save)


def write(path: str | Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """A ``.pdparams`` checkpoint: ``{"model": arrays, "facts": JSON text}``, without Paddle.

    ``layer.set_state_dict(paddle.load(path)["model"])`` opens it with nothing of this repository.

    Raises:
        CheckpointError: facts of another schema, or a value that is no array of numbers.
        OSError: the file cannot be written; an older one is untouched.
    """
    check_facts(path, dict(facts))
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in _KINDS:
            got = getattr(array, "dtype", type(array).__name__)
            raise CheckpointError(f"{path}: {name} is {got}, expected an array of numbers")
    text = facts_to_json({**facts, "sha256": weights_sha256(arrays)})
    write_pickle(path, {"model": dict(arrays), "facts": text})


def read(
    path: str | Path, *, project: str | None = None, architecture: str | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and facts of a ``.pdparams`` checkpoint of this repository, without Paddle.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: hostile, truncated, damaged, of another schema, project, architecture.
    """
    content = read_pickle(path)
    facts = facts_from_json(path, content.get("facts") if isinstance(content, dict) else None)
    check_facts(path, facts, project=project, architecture=architecture)
    arrays = state_arrays(path, content.get("model"))
    check_sha256(path, facts, weights_sha256(arrays))
    return arrays, facts
