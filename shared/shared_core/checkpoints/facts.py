"""The plain-JSON facts that stand beside the weights in every checkpoint."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_core.checkpoints.errors import CheckpointError

SCHEMA = "smallvision-checkpoint/1"
FRAMEWORKS = ("torch", "paddle", "numpy")
REQUIRED = ("schema", "project", "architecture", "framework", "class_names")


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON holds it; numbers that are not finite become null (JSON has none)."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number
        return _plain(value.item(), where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"facts: key {key!r} of {where} is not a string")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise CheckpointError(
        f"facts: {where} is a {type(value).__name__}, expected what JSON can hold"
    )


def make_facts(
    *,
    project: str,
    architecture: str,
    class_names: Sequence[str],
    framework: str,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    split_hash: str | None = None,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Facts of a checkpoint as plain JSON: strings, numbers, lists, dicts.

    Args:
        project: the package that can load the file, for example ``"gfnet_dynn"``.
        architecture: the name under which that package builds the model.
        class_names: in the order of the logits; may be empty for a model without classes.
        framework: ``"torch"``, ``"paddle"`` or ``"numpy"``: whose names the weights carry.
        input_size: ``(C, H, W)`` in pixels.
        mean: of the input normalisation, per RGB channel, images in [0, 1].
        std: likewise.
        epoch: epochs finished.
        metrics: fractions in [0, 1], losses in nats...; not-finite numbers are kept as null.
        split_hash: hash of the split manifest of the data.
        config: every option of the run.
        more: further facts of the project.

    Raises:
        CheckpointError: an unknown framework, or a value that JSON cannot hold.
    """
    if framework not in FRAMEWORKS:
        raise CheckpointError(
            f"facts: framework is {framework!r}, expected one of {', '.join(FRAMEWORKS)}"
        )
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "project": project,
        "architecture": architecture,
        "class_names": list(class_names),
        "framework": framework,
        "input_size": None if input_size is None else list(input_size),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "epoch": epoch,
        "metrics": dict(metrics or {}),
        "split_hash": split_hash,
        "config": dict(config or {}),
        **more,
    }
    plain: dict[str, Any] = _plain(facts, "facts")
    return plain


def check_facts(
    path: str | Path,
    facts: object,
    *,
    project: str | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """``facts`` when they are of this schema and of the wanted project; else an error.

    Args:
        path: the file, for the message.
        facts: what was read from it.
        project: the project that is loading, or None for any.
        architecture: the architecture that is wanted, or None for any.

    Raises:
        CheckpointError: wrong schema, a missing fact, another project or architecture.
    """
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: facts are a {type(facts).__name__}, expected a JSON object")
    if facts.get("schema") != SCHEMA:
        got = str(facts.get("schema"))[:60]
        raise CheckpointError(f"{path}: schema is {got!r}, expected {SCHEMA!r}")
    missing = [name for name in REQUIRED if name not in facts]
    if missing:
        raise CheckpointError(f"{path}: facts lack {', '.join(missing)}")
    for name, wanted in (("project", project), ("architecture", architecture)):
        if wanted is not None and facts[name] != wanted:
            got = str(facts[name])[:60]
            raise CheckpointError(f"{path}: {name} is {got!r}, expected {wanted!r}")
    return facts


def facts_to_json(facts: Mapping[str, Any]) -> str:
    """One line of JSON, keys in order of insertion."""
    return json.dumps(_plain(facts, "facts"), ensure_ascii=False, allow_nan=False)


def facts_from_json(path: str | Path, text: object) -> dict[str, Any]:
    """The facts in ``text``, which was read from ``path``; ``CheckpointError`` if they are none."""
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: holds no facts, so it is no checkpoint of this repository")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its facts are not JSON") from error
    return check_facts(path, facts)
