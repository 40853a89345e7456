"""Any classification network by its name: the core's own, torchvision's, timm's; and its head.

``efficientnet_lite0`` (``1``, ``2``; also ``lite0`` ...) are the core's twins, whose weights come
as packages. ``torchvision/NAME`` and ``timm/NAME`` choose a library; a bare name is torchvision's
if it has one, else timm's. timm is needed only for its own networks.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import nn

from shared_core.for_torch.efficientnet_lite import EfficientNetLite
from shared_core.weights.catalogue import ALIASES, entry
from shared_core.weights.efficientnet_lite import VARIANTS

LIBRARIES = ("core", "torchvision", "timm")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
# Both learned from images scaled to [-1, 1]; with this they take ImageNet-normalised ones. It is
# set with and without weights, so that a checkpoint of either is the same network.
_INCEPTION = {"aux_logits": False, "transform_input": True, "init_weights": True}
_TORCHVISION_SETTINGS = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}


@dataclass(frozen=True)
class NetworkName:
    """A network as a library knows it.

    Attributes:
        asked: as the user wrote it.
        library: ``core``, ``torchvision`` or ``timm``.
        name: in that library.
    """

    asked: str
    library: str
    name: str


@dataclass(frozen=True)
class Network:
    """A network that takes normalised images ``(N, 3, H, W)`` and gives logits ``(N, K)``.

    Attributes:
        model: in training mode.
        name: which it is.
        mean, std: of RGB in [0, 1], that its weights were trained with.
        input_size: side in pixels that its weights were trained at; None where not known.
        notes: what the user should be told, one line each.
        start: where the weights are from, plain JSON for records and model cards; empty: random.
    """

    model: nn.Module
    name: NetworkName
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    input_size: int | None = None
    notes: tuple[str, ...] = ()
    start: dict[str, Any] = field(default_factory=dict)


def list_networks(library: str | None = None) -> list[str]:
    """Every name that :func:`find_network` takes without a prefix, sorted; or one library's own.

    Raises:
        ValueError: an unknown library.
    """
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library {library!r}, expected one of {', '.join(LIBRARIES)}")
    names: set[str] = set()
    for one in LIBRARIES if library is None else (library,):
        names.update(_names_in(one))
    return sorted(names)


def _names_in(library: str) -> Sequence[str]:
    if library == "core":
        return tuple(VARIANTS)
    if find_spec(library) is None:
        return ()
    if library == "torchvision":
        from torchvision import models

        return list(models.list_models(module=models))  # classification only
    import timm

    return list(timm.list_models())


def _has(library: str, name: str) -> bool:
    if library != "timm":
        return name in _names_in(library)
    if find_spec("timm") is None:
        return False
    import timm

    return bool(timm.is_model(name))  # also knows a name with the tag of its weights


def find_network(asked: str) -> NetworkName:
    """The network that a name means; dashes count as underscores (``efficientnet-b0``).

    Raises:
        ValueError: no such network; the closest names are offered.
    """
    for spelled in dict.fromkeys((asked, asked.replace("-", "_"))):
        library, slash, name = spelled.replace(":", "/", 1).partition("/")
        if slash and library not in LIBRARIES:
            break
        name = ALIASES.get(name if slash else spelled, name if slash else spelled)
        for one in (library,) if slash else LIBRARIES:
            if _has(one, name):
                return NetworkName(asked, one, name)
    close = difflib.get_close_matches(asked, list_networks(), n=4)
    hint = f"; close: {', '.join(close)}" if close else ""
    raise ValueError(
        f"network {asked!r}: expected one of {', '.join(VARIANTS)}, of torchvision or of timm{hint}"
    )


def make_network(
    name: NetworkName | str,
    *,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Network:
    """A network with random weights.

    Args:
        num_classes: outputs of the head, 2 or more.
        image_size: ``(height, width)`` in pixels, for networks that are built for one size.
        drop_rate: dropout before the head, in ``[0, 1)``.
        drop_path_rate: stochastic depth of the last block, in ``[0, 1)``.

    Raises:
        ValueError: unknown name, a count below 2, a size that the network cannot take, or a rate
            that it has no place for.
    """
    found = find_network(name) if isinstance(name, str) else name
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2 or more")
    if found.library == "core":
        known = entry(found.name)
        model: nn.Module = EfficientNetLite(
            found.name, num_classes=num_classes, drop_rate=drop_rate, drop_path_rate=drop_path_rate
        )
        if known is None:
            return Network(model, found)
        return Network(model, found, known.mean, known.std, known.input_size)
    try:
        if found.library == "torchvision":
            model = _torchvision(found.name, num_classes, image_size, drop_rate, drop_path_rate)
            return Network(model, found)
        return _timm(found, num_classes, image_size, drop_rate, drop_path_rate)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        size = "" if image_size is None else f" for {image_size[0]} x {image_size[1]} pixels"
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"network {found.asked}{size}: {reason}") from error


def _torchvision(
    name: str,
    num_classes: int,
    image_size: tuple[int, int] | None,
    drop_rate: float,
    drop_path_rate: float,
) -> nn.Module:
    from torchvision import models
    from torchvision.ops import StochasticDepth

    settings: dict[str, Any] = dict(_TORCHVISION_SETTINGS.get(name, {}))
    if image_size is not None and name.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise ValueError("it takes square images only")
        settings["image_size"] = image_size[0]
    elif image_size is not None and name.startswith("maxvit"):
        settings["input_size"] = image_size
    if drop_rate:
        settings["dropout"] = drop_rate
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **settings)
    if drop_path_rate:
        depths = [one for one in model.modules() if isinstance(one, StochasticDepth)]
        if not depths:
            raise ValueError("it has no stochastic depth: expected a drop path rate of 0")
        for index, one in enumerate(depths):
            one.p = drop_path_rate * index / len(depths)
    return model


def _timm(
    found: NetworkName,
    num_classes: int,
    image_size: tuple[int, int] | None,
    drop_rate: float,
    drop_path_rate: float,
) -> Network:
    import timm

    settings: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(found.name)
    if image_size is not None and config is not None and config.fixed_input_size:
        settings["img_size"] = image_size
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if rate:
            settings[name] = rate
    model = timm.create_model(found.name, num_classes=num_classes, **settings)
    facts = getattr(model, "pretrained_cfg", None) or {}
    return Network(
        model,
        found,
        tuple(facts.get("mean", IMAGENET_MEAN)),
        tuple(facts.get("std", IMAGENET_STD)),
        int(facts["input_size"][1]) if facts.get("input_size") else None,
    )


# -- the head -------------------------------------------------------------------------------------


def outputs(layer: nn.Module | None) -> int | None:
    """Outputs of a linear layer or convolution; None for anything else."""
    if isinstance(layer, nn.Linear):
        return int(layer.out_features)
    return int(layer.out_channels) if isinstance(layer, nn.Conv2d) else None


def head_names(model: nn.Module, num_classes: int) -> list[str]:
    """Names of the modules that give the logits; one, or two for networks with a second head.

    timm names them itself. For others it is the last linear layer or convolution that has
    ``num_classes`` outputs.

    Raises:
        ValueError: no such layer.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if hasattr(config, "get") else None
    modules = dict(model.named_modules())
    if named:
        wanted = [named] if isinstance(named, str) else list(named)
        found = [name for name in wanted if outputs(modules.get(name)) == num_classes]
        if found:
            return found
    for name in reversed(list(modules)):
        if outputs(modules[name]) == num_classes:
            return [name]
    raise ValueError(f"{type(model).__name__} has no layer with {num_classes} outputs")


def head_keys(heads: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Those of a state dict's ``keys`` that belong to the ``heads``."""
    prefixes = tuple(f"{head}." for head in heads)
    return [key for key in keys if key.startswith(prefixes)]
