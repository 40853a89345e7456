"""Which maintained network each architecture name stands for.

The zoo writes no network by hand: a name is one of torchvision's, one of timm's, or an older name
of the table below. ``torchvision/NAME`` and ``timm/NAME`` choose the library where both have one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

LIBRARIES = ("torchvision", "timm")

# Older name -> library/name. Parameter counts are those of the published networks, see the tests.
ALIASES = {
    "mobilenetv3_small": "torchvision/mobilenet_v3_small",
    "mobilenetv3_large": "torchvision/mobilenet_v3_large",
    "efficientnet_b8": "timm/efficientnet_b8",
    "resnest50": "timm/resnest50d",
    "resnest101": "timm/resnest101e",
    "resnest200": "timm/resnest200e",
    "resnest269": "timm/resnest269e",
    "resnest50_fast_4s2x40d": "timm/resnest50d_4s2x40d",
    "resnest50_fast_1s4x24d": "timm/resnest50d_1s4x24d",
}

# ResNeSt-50 "fast" settings that timm does not register: radix, cardinality, bottleneck width.
# Source: Zhang et al. 2020, arXiv:2004.08955, table of ablations (radix s, cardinality x, width d).
RESNEST_FAST = {
    "resnest50_fast_1s1x64d": (1, 1, 64),
    "resnest50_fast_2s1x64d": (2, 1, 64),
    "resnest50_fast_4s1x64d": (4, 1, 64),
    "resnest50_fast_1s2x40d": (1, 2, 40),
    "resnest50_fast_2s2x40d": (2, 2, 40),
}


@dataclass(frozen=True)
class Resolved:
    """A network: the library that holds it, its name there, and settings of its own."""

    arch: str  # as the user wrote it
    library: str  # "torchvision", "timm" or "resnest_fast"
    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def resolve(arch: str) -> Resolved:
    """Find the network that ``arch`` names; dashes count as underscores (``efficientnet-b0``).

    The order is: the table of older names, torchvision, timm.

    Raises:
        ValueError: no such network; the closest names are offered.
    """
    for spelled in dict.fromkeys((arch, arch.replace("-", "_"))):
        library, slash, name = ALIASES.get(spelled, spelled).partition("/")
        if spelled in RESNEST_FAST:
            radix, cardinality, width = RESNEST_FAST[spelled]
            settings = {"radix": radix, "cardinality": cardinality, "base_width": width}
            return Resolved(arch, "resnest_fast", spelled, settings)
        choices = (library,) if slash else LIBRARIES
        name = name if slash else spelled
        if slash and library not in LIBRARIES:
            break
        for choice in choices:
            if _has(choice, name):
                return Resolved(arch, choice, name)
    close = difflib.get_close_matches(arch, list_archs(), n=4)
    hint = f"; close: {', '.join(close)}" if close else ""
    raise ValueError(f"--arch {arch!r}, expected a name of torchvision or timm{hint}")


def list_archs(library: str | None = None) -> list[str]:
    """Every name that :func:`resolve` takes without a prefix, sorted; or one library's own.

    Raises:
        ValueError: an unknown library.
    """
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library {library!r}, expected one of {', '.join(LIBRARIES)}")
    names: set[str] = set()
    if library in (None, "torchvision"):
        names.update(_torchvision_names())
    if library in (None, "timm"):
        import timm

        names.update(timm.list_models())
    if library is None:
        names.update(ALIASES, RESNEST_FAST)
    return sorted(names)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))  # classification only


def _has(library: str, name: str) -> bool:
    if library == "torchvision":
        return name in _torchvision_names()
    import timm

    return bool(timm.is_model(name))
