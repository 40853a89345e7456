"""Seeds: one number from the user, independent ones for every use."""

from __future__ import annotations

import hashlib
import random


def seed_python_numpy(seed: int) -> None:
    """Seed Python's ``random`` and NumPy's global generator. For entry scripts, not for libraries.

    Args:
        seed: in ``[0, 2**32)``.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: expected an integer in [0, 2**32)")
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed in ``[0, 2**63)`` that depends on ``seed`` and on what it is for, and on nothing else.

    Two purposes get unrelated streams, so that a draw added for one never shifts the other.
    """
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
