"""Keep the k largest outputs of a teacher and what the others weigh together."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def compress(values: Array, k: int, *, kind: str) -> tuple[Array, Array, Array]:
    """The ``k`` largest of each row, their places, and the rest in one number.

    Args:
        values: float, shape ``(N, C)``: logits, or probabilities in [0, 1].
        k: ``1 <= k < C``.
        kind: ``"logits"`` or ``"probs"``.

    Returns:
        values ``(N, k)`` sorted from large to small, their class numbers ``(N, k)`` int32, and the
        rest ``(N,)``: log-sum-exp of the other logits, or sum of the other probabilities.
    """
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(-values, axis=1, kind="stable")
    top, rest = order[:, :k], order[:, k:]
    others = np.take_along_axis(values, rest, axis=1)
    if kind == "logits":
        peak = others.max(axis=1, keepdims=True)
        tail = np.log(np.exp(others - peak).sum(axis=1)) + peak[:, 0]
    else:
        tail = others.sum(axis=1)
    return np.take_along_axis(values, top, axis=1), top.astype(np.int32), tail


def expand(top: Array, places: Array, tail: Array, *, classes: int, kind: str) -> Array:
    """All ``C`` outputs again: the kept ones as they were, the rest shared equally.

    The soft-max of the result gives the kept classes the probabilities that they had, and the
    others together the mass that they had together.

    Args:
        top: ``(N, k)``.
        places: class numbers, ``(N, k)``.
        tail: ``(N,)`` as :func:`compress` made it.
        classes: ``C``.
        kind: ``"logits"`` or ``"probs"``.

    Returns:
        float32, shape ``(N, C)``.
    """
    n, k = top.shape
    others = classes - k
    share = tail - np.log(others) if kind == "logits" else tail / others
    values = np.repeat(share.astype(np.float32)[:, None], classes, axis=1)
    np.put_along_axis(values, places.astype(np.int64), top.astype(np.float32), axis=1)
    return values
