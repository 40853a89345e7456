"""Which maintained network each architecture name of the zoo stands for.

The zoo writes no network by hand: a name is one that the core finds (its own, torchvision's or
timm's; ``torchvision/NAME`` and ``timm/NAME`` choose), or an older name of the tables below.
"""

from __future__ import annotations

from shared_core.for_torch.networks import NetworkName, find_network

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
FAST = "resnest_fast"  # the library of these


def resolve(arch: str) -> NetworkName:
    """The network that ``arch`` names; dashes count as underscores (``efficientnet-b0``).

    Raises:
        ValueError: no such network; the closest names are offered.
    """
    spelled = arch.replace("-", "_")
    if spelled in RESNEST_FAST:
        return NetworkName(arch, FAST, spelled)
    try:
        found = find_network(ALIASES.get(spelled, arch))
    except ValueError as error:
        from timm import is_model

        tagged = arch.removeprefix("timm/")  # with the name of its weights: resnet18.a1_in1k
        if not tagged or not is_model(tagged):
            raise ValueError(f"--arch: {error}") from None
        return NetworkName(arch, "timm", tagged)
    return NetworkName(arch, found.library, found.name)
