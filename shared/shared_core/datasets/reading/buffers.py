"""Arrays that are used again once nobody holds them: fresh memory costs as much as decoding."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt


class BufferPool:
    """Hands out arrays, and takes one back by itself when nothing refers to it any more.

    An array, a view of it, a tensor made from it without a copy: each keeps it out of the pool, so
    what was handed out stays valid for as long as it is held. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self._lock = threading.Lock()
        # What the interpreter counts for an array that only a list holds differs with its version.
        self._idle = _reference_counts([np.empty(1)])[0]

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of this shape and type, of unknown content."""
        dtype = np.dtype(dtype)
        with self._lock:
            counts = _reference_counts(self._arrays)
            idle = [n for n, count in enumerate(counts) if count <= self._idle]
            for n in idle:
                if self._arrays[n].shape == shape and self._arrays[n].dtype == dtype:
                    return self._arrays[n]
            # What is idle and of another shape will hardly be asked for again.
            for n in reversed(idle):
                del self._arrays[n]
            array = np.empty(shape, dtype=dtype)
            self._arrays.append(array)
            return array


def _reference_counts(arrays: list[npt.NDArray[Any]]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]
