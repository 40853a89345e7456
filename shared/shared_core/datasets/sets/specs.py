"""The known datasets by name: look one up in any spelling, or add one's own."""

from __future__ import annotations

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.sets.spec_tables import SPECS
from shared_core.datasets.sets.spec_type import DatasetSpec, normal_name

__all__ = ["DatasetSpec", "get", "names", "normal_name", "register"]

# The one registry of the process; it grows through register() only.
_known: list[DatasetSpec] = list(SPECS)


def _all_names(spec: DatasetSpec) -> set[str]:
    return {normal_name(name) for name in (spec.name, *spec.aliases)}


def get(name: str) -> DatasetSpec:
    """The fact sheet of ``name``, whatever its case, spaces, hyphens, or alias.

    Raises:
        DatasetError: no such dataset; the line lists the known names.
    """
    wanted = normal_name(name)
    for spec in _known:
        if wanted in _all_names(spec):
            return spec
    raise DatasetError(f"unknown dataset {name!r}; known: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """The names of the known datasets, in the order they were registered."""
    return tuple(spec.name for spec in _known)


def register(spec: DatasetSpec) -> DatasetSpec:
    """Make ``spec`` known to ``get`` and return it.

    Raises:
        DatasetError: its name or one of its aliases is empty or taken.
    """
    if "" in _all_names(spec):
        raise DatasetError(f"dataset name or alias without a letter or digit in {spec.name!r}")
    for known in _known:
        if taken := _all_names(spec) & _all_names(known):
            raise DatasetError(
                f"dataset name {sorted(taken)[0]!r} of {spec.name!r} is taken by {known.name!r}"
            )
    _known.append(spec)
    return spec
