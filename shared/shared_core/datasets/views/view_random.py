"""The random numbers of a view: a counter-based generator keyed by (seed, image key, view)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Key = str | int


def view_rng(seed: int, key: Key, view: int) -> np.random.Generator:
    """The generator of one view: Philox keyed by BLAKE2b of ``"seed|view|key"``."""
    words = _philox_key(seed, key, view)
    return np.random.Generator(np.random.Philox(key=np.array(words, dtype=np.uint64)))


class ViewRandom:
    """``view_rng`` for a loop: one generator, moved from view to view (ten times faster).

    ``at`` gives the same numbers as ``view_rng``, but the generator of the call before is the same
    object: use one a thread, and one view at a time.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)

    def at(self, seed: int, key: Key, view: int) -> np.random.Generator:
        """The generator at the first number of the view."""
        # Plain tuples are several times cheaper to set than the arrays that the type hints name.
        state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": (0, 0, 0, 0), "key": _philox_key(seed, key, view)},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,  # nothing left in the buffer
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._bits.state = state
        return self._generator


def _philox_key(seed: int, key: Key, view: int) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}|{view}|{key}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
