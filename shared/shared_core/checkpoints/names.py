"""The same weights under torch's and under Paddle's names and layouts.

Three things differ for the layers that both have (convolution, batch norm, layer norm, embedding,
linear): the statistics of a batch norm have other names, torch counts its batches and Paddle does
not, and the matrix of a linear layer is ``(out, in)`` in torch and ``(in, out)`` in Paddle.
"""

from collections.abc import Collection, Mapping

import numpy as np

from shared_core.checkpoints.digest import Array
from shared_core.checkpoints.errors import CheckpointError

_TO_PADDLE = {"running_mean": "_mean", "running_var": "_variance"}
_TO_TORCH = {paddle: torch for torch, paddle in _TO_PADDLE.items()}
_COUNTER = "num_batches_tracked"


def _split(name: str) -> tuple[str, str]:
    parent, dot, leaf = name.rpartition(".")
    return parent + dot, leaf


def linear_names(arrays: Mapping[str, Array], *, not_linear: Collection[str] = ()) -> list[str]:
    """Names of the matrices that are linear layers: all two-dimensional ``weight`` arrays.

    Args:
        arrays: weights under torch's or Paddle's names.
        not_linear: two-dimensional weights that are none, such as embeddings.

    Raises:
        CheckpointError: ``not_linear`` names a weight that is not there.
    """
    unknown = [name for name in not_linear if name not in arrays]
    if unknown:
        raise CheckpointError(f"no weight is called {unknown[0]!r}")
    return [
        name
        for name, array in arrays.items()
        if array.ndim == 2 and _split(name)[1] == "weight" and name not in not_linear
    ]


def _transposed(name: str, array: Array) -> Array:
    if array.ndim != 2:
        raise CheckpointError(f"linear weight {name} has shape {array.shape}, expected two axes")
    return np.ascontiguousarray(array.T)


def counters(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Batches counted by each batch norm of torch, by name; Paddle has no place for them."""
    return {name: int(array) for name, array in arrays.items() if _split(name)[1] == _COUNTER}


def to_paddle(arrays: Mapping[str, Array], linear: Collection[str]) -> dict[str, Array]:
    """Weights of torch as Paddle wants them.

    Args:
        arrays: under torch's names.
        linear: names of the linear layers' matrices; they are transposed.

    Returns:
        The arrays under Paddle's names. ``num_batches_tracked`` is gone; :func:`counters` tells it.

    Raises:
        CheckpointError: a fused attention projection (Paddle has three layers there), or a
            ``linear`` name that is missing or no matrix.
    """
    missing = [name for name in linear if name not in arrays]
    if missing:
        raise CheckpointError(f"linear weight {missing[0]} is not among the weights")
    renamed: dict[str, Array] = {}
    for name, array in arrays.items():
        parent, leaf = _split(name)
        if leaf == _COUNTER:
            continue
        if leaf.startswith("in_proj_"):
            raise CheckpointError(f"{name}: torch's fused attention has no twin in Paddle")
        new = parent + _TO_PADDLE.get(leaf, leaf)
        renamed[new] = _transposed(name, array) if name in linear else array
    return renamed


def to_torch(
    arrays: Mapping[str, Array],
    linear: Collection[str],
    *,
    tracked: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Weights of Paddle as torch wants them; undoes :func:`to_paddle` bit for bit.

    Args:
        arrays: under Paddle's names.
        linear: names of the linear layers' matrices; they are transposed.
        tracked: batches counted per ``num_batches_tracked`` name; 0 for those not given.

    Raises:
        CheckpointError: a ``linear`` name that is missing or no matrix.
    """
    missing = [name for name in linear if name not in arrays]
    if missing:
        raise CheckpointError(f"linear weight {missing[0]} is not among the weights")
    tracked = tracked or {}
    renamed: dict[str, Array] = {}
    for name, array in arrays.items():
        parent, leaf = _split(name)
        new = parent + _TO_TORCH.get(leaf, leaf)
        renamed[new] = _transposed(name, array) if name in linear else array
        if leaf == "_variance":  # torch keeps its counter right behind the statistics
            counter = parent + _COUNTER
            renamed[counter] = np.array(tracked.get(counter, 0), dtype=np.int64)
    return renamed


def unbiased_variance(variance: Array, *, count: int) -> Array:
    """A batch variance as Paddle's batch norm keeps it, turned into the one torch keeps.

    Paddle's running variance averages biased batch variances (divided by ``n``), torch's the
    unbiased ones (divided by ``n - 1``). The correction is exact when all batches had ``count``
    values per channel and the starting value has decayed.

    Args:
        variance: shape ``(C,)``.
        count: values per channel in a batch, ``N * H * W``; at least 2.

    Raises:
        ValueError: ``count`` below 2.
    """
    if count < 2:
        raise ValueError(f"count is {count}, expected at least 2 values per channel")
    return np.asarray(variance * (count / (count - 1)), dtype=variance.dtype)
