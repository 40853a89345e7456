"""Say which weights do not fit a model, instead of loading the rest in silence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared_core.checkpoints.errors import CheckpointError, first_few

Shapes = Mapping[str, Sequence[int]]


def check_fit(
    path: str | Path,
    *,
    model: Shapes,
    weights: Shapes,
    model_floats: Mapping[str, bool] | None = None,
    weight_floats: Mapping[str, bool] | None = None,
) -> None:
    """Every weight of the model must be in the file with its shape, and nothing else.

    Args:
        path: the file, for the message.
        model: shape per name that the model has.
        weights: shape per name that the file has.
        model_floats, weight_floats: which of them hold floating-point numbers. Integers where the
            model has floats are bits of another format; both kinds given, they are compared.

    Raises:
        CheckpointError: names the first missing, unexpected, misshaped weights, and those that
            hold integers instead of floats or floats instead of integers.
    """
    missing = [name for name in model if name not in weights]
    unexpected = [name for name in weights if name not in model]
    misshaped = [
        f"{name} {tuple(weights[name])} instead of {tuple(shape)}"
        for name, shape in model.items()
        if name in weights and tuple(weights[name]) != tuple(shape)
    ]
    kinds = {True: "floats", False: "integers"}
    other = [
        f"{name} {kinds[weight_floats[name]]} instead of {kinds[is_float]}"
        for name, is_float in (model_floats or {}).items()
        if weight_floats and weight_floats.get(name, is_float) != is_float
    ]
    problems = [
        f"{len(names)} {kind} ({first_few(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshaped", misshaped),
            ("of another type", other),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: weights do not fit the model: {'; '.join(problems)}")


def plain_names(names: Sequence[str]) -> dict[str, str]:
    """Old name to new name, without the prefix that a data-parallel or compiling wrapper adds.

    ``module.`` and ``_orig_mod.`` go only when every name carries them, so a model that has a
    child called ``module`` keeps it unless all its weights live there.
    """
    plain = {name: name for name in names}
    changed = True
    while changed and plain:
        changed = False
        for prefix in ("module.", "_orig_mod."):
            if all(new.startswith(prefix) for new in plain.values()):
                plain = {old: new[len(prefix) :] for old, new in plain.items()}
                changed = True
    return plain
