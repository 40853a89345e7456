"""CIFAR-10 as its authors give it out: five pickled batches and a test batch, read unexecuted.

A pickle may call any function of any package. The official files need three names of NumPy; only
stand-ins of this module answer to them, and what they build is an array of bytes or an error.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.checkpoints.pickle_check import PickleRefused, check_pickle
from shared_core.datasets import DatasetError

SIDE = 32
TRAIN_FILES = tuple(f"data_batch_{n}" for n in range(1, 6))
TEST_FILE, META_FILE = "test_batch", "batches.meta"


@dataclass(frozen=True)
class Arrays:
    """Images in memory.

    Attributes:
        images: uint8 ``(N, 32, 32, 3)``, RGB.
        labels: int64 ``(N,)``.
        parts: ``train`` or ``test`` of each image.
        names: what to call each image: batch file and number.
        classes: class names; labels index them.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    parts: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]


class _Refused(Exception):
    """Something else than arrays of bytes and plain values."""


class _Dtype:
    """Stands in for ``numpy.dtype``; the files know ``u1`` only."""

    def __init__(self, code: object = None, *_flags: object) -> None:
        if _text(code) not in ("u1", "|u1"):
            raise _Refused(f"an array of {str(code)[:20]!r}")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands in for ``numpy.ndarray`` until the pickle is read."""

    def __init__(self, state: tuple[Any, ...] = ()) -> None:
        self.state = state

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("a malformed array")
        _version, shape, _dtype, fortran, data = state
        self.state = (data, shape, bool(fortran))

    def build(self) -> npt.NDArray[np.uint8]:
        if not self.state:
            raise _Refused("an array without its data")
        data, shape, fortran = self.state
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(raw, (bytes, bytearray)) or not isinstance(shape, tuple):
            raise _Refused("an array of Python objects")
        if len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape):
            raise _Refused("an array that is no table")
        if shape[0] * shape[1] != len(raw):
            raise _Refused("an array whose size is not that of its data")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Name:
    """The bare name ``numpy.ndarray``, which files pass to ``_reconstruct``."""


def _reconstruct(*_args: object) -> _Array:
    return _Array()


def _frombuffer(data: object, _dtype: object, shape: object, order: object) -> _Array:
    return _Array((data, shape, order == "F"))


def _encode(text: object, codec: object) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise _Refused("a codec other than latin1")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Name,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy.core.numeric", "_frombuffer"): _frombuffer,
            ("_codecs", "encode"): _encode,
        }
        found = known.get((module.replace("numpy._core.", "numpy.core.", 1), name))
        if found is None:
            raise _Refused(f"{module}.{name}"[:80])
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent id")


def read_batch(path: str | Path) -> dict[str, Any]:
    """One pickled file: its entries under text names, arrays as uint8 tables.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: damaged, or it holds anything but arrays of bytes and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the files of cifar-10-batches-py")
    try:
        with path.open("rb") as file:
            check_pickle(file)
            # The official files are of Python 2, whose texts are bytes; latin1 keeps each of them.
            content = _Unpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise _Refused(f"a {type(content).__name__}, not entries by name")
        return {_text(k): v.build() if isinstance(v, _Array) else v for k, v in content.items()}
    except (_Refused, PickleRefused) as error:
        raise DatasetError(f"{path}: refused, it holds {error}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DatasetError(f"{path}: no readable batch ({type(error).__name__})") from error


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _images_and_labels(path: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    content = read_batch(path)
    data, labels = content.get("data"), content.get("labels")
    if not isinstance(data, np.ndarray) or data.shape[1] != 3 * SIDE * SIDE:
        raise DatasetError(f"{path}: no table of {3 * SIDE * SIDE} bytes an image under 'data'")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DatasetError(f"{path}: expected {len(data)} numbers under 'labels'")
    if not all(type(label) is int for label in labels):
        raise DatasetError(f"{path}: a label is no whole number")
    planes = data.reshape(-1, 3, SIDE, SIDE)  # colour by colour, row by row
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def is_batches(folder: str | Path) -> bool:
    """Whether a folder holds the official files."""
    return (Path(folder) / TRAIN_FILES[0]).is_file()


def read_batches(folder: str | Path) -> Arrays:
    """The training batches and the test batch of ``folder``.

    Raises:
        FileNotFoundError: one of the six files or the class names are missing.
        DatasetError: see :func:`read_batch`; a label without a class.
    """
    folder = Path(folder)
    names = read_batch(folder / META_FILE).get("label_names")
    if not isinstance(names, list) or len(names) < 2:
        raise DatasetError(f"{folder / META_FILE}: expected names under 'label_names'")
    images, labels, parts, said = [], [], [], []
    for file in (*TRAIN_FILES, TEST_FILE):
        pixels, numbers = _images_and_labels(folder / file)
        images.append(pixels)
        labels += numbers
        parts += ["test" if file == TEST_FILE else "train"] * len(numbers)
        said += [f"{file}/{n:05d}" for n in range(len(numbers))]
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise DatasetError(f"{folder}: a label is outside 0 to {len(names) - 1}")
    return Arrays(
        np.concatenate(images), np.array(labels, dtype=np.int64), tuple(parts), tuple(said),
        tuple(_text(name) for name in names),
    )  # fmt: skip
