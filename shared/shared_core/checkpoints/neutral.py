"""Checkpoints that belong to no framework: safetensors with the facts in its metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shared_core.checkpoints.atomic import atomic_write
from shared_core.checkpoints.digest import Array, check_sha256, weights_sha256
from shared_core.checkpoints.errors import CheckpointError
from shared_core.checkpoints.facts import check_facts, facts_from_json, facts_to_json
from shared_core.checkpoints.source import readable_file

FACTS_KEY = "smallvision_facts"


def write(path: str | Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write named arrays and their facts to one safetensors file.

    Args:
        path: usually ends in ``.safetensors``.
        arrays: booleans, integers or floats of any shape; stored bit for bit, little-endian.
        facts: from :func:`~shared_core.checkpoints.facts.make_facts`; ``sha256`` is added.

    Raises:
        CheckpointError: facts of another schema, or an array of another dtype, complex too.
        OSError: the file cannot be written; an older one is untouched.
    """
    check_facts(path, dict(facts))
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise CheckpointError(
                f"{path}: {name} has dtype {array.dtype}, expected booleans, integers or floats "
                "of at most 64 bits"
            )
    text = facts_to_json({**facts, "sha256": weights_sha256(arrays)})
    # Zero-dimensional and strided arrays both have to be plain C order for the writer.
    plain = {name: np.require(array, requirements="C") for name, array in arrays.items()}

    def save(scratch: Path) -> None:
        scratch.touch()  # with the rights that the user's new files have; the writer gives 0600
        rights = scratch.stat().st_mode
        try:
            save_file(plain, scratch, metadata={FACTS_KEY: text})
        except SafetensorError as error:
            raise OSError(str(error).splitlines()[0]) from error
        scratch.chmod(rights)

    atomic_write(path, save)


def read_arrays(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and raw metadata of any safetensors file, whoever wrote it.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: no whole safetensors file.
    """
    path = readable_file(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: no readable safetensors file ({reason})") from error
    return arrays, metadata


def read(
    path: str | Path, *, project: str | None = None, architecture: str | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and facts of a file that :func:`write` wrote; its sha256 is checked.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: truncated, damaged, of another schema, project or architecture.
    """
    arrays, metadata = read_arrays(path)
    facts = facts_from_json(path, metadata.get(FACTS_KEY))
    check_facts(path, facts, project=project, architecture=architecture)
    check_sha256(path, facts, weights_sha256(arrays))
    return arrays, facts
