"""Trained weights for a network of Paddle: a file, an installed package, or paddle.vision's own."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from shared_core.checkpoints import names, weights_sha256
from shared_core.checkpoints.digest import Array
from shared_core.for_paddle.checkpoints import to_numpy
from shared_core.runs.command import UsageError
from shared_core.weights.catalogue import CATALOGUE, entry
from shared_core.weights.finding import NONE, find_weights, how_to_get
from shared_core.weights.reading import read_weights


def start_weights(architecture: str, init: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """The weights that ``--init`` means for a network, under Paddle's names.

    Args:
        architecture: a name of the catalogue, or of ``paddle.vision.models``.
        init: ``trained``, a name of the catalogue, or a file of torch, Paddle or safetensors.

    Returns:
        The arrays, and plain facts of them for records and model cards.

    Raises:
        UsageError: no such weights, or none that can be had here; the line says how to get some.
        CheckpointError: a file that holds none.
    """
    found = find_weights(init, architecture=architecture)
    if found is None:
        return _library_weights(architecture)
    return paddle_names(read_weights(found.path)), found.facts()


def paddle_names(arrays: dict[str, Array]) -> dict[str, Array]:
    """Arrays under Paddle's names; those of torch are known by their batch-norm statistics."""
    if any(name.endswith("running_mean") for name in arrays):
        return names.to_paddle(arrays, names.linear_names(arrays))
    return arrays


def _library_weights(architecture: str) -> tuple[dict[str, Array], dict[str, Any]]:
    known = entry(architecture)
    if known is not None:
        raise UsageError(
            f"no trained weights of {known.name} are installed; get them by: {how_to_get(known)}"
        )
    from paddle.vision import models

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            net = getattr(models, architecture)(pretrained=True)
    except Exception as error:  # fetching ends in errors of several libraries
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        first = CATALOGUE[0]
        raise UsageError(
            f"no trained weights of {architecture} can be had here ({reason}): give a file by "
            f"--init FILE, say --init {NONE}, or take {first.name}, whose weights come by: "
            f"{how_to_get(first)}"
        ) from error
    word = f"paddle.vision {architecture}"
    facts = {"name": word, "licence": "Apache-2.0", "trained_on": "ImageNet-1k"}
    arrays = to_numpy(net.state_dict())
    return arrays, {**facts, "sha256": weights_sha256(arrays)}
