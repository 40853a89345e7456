"""Build a network by its name, with a head for the user's classes and weights if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import from_numpy, load_checkpoint
from shared_core.for_torch.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Network,
    NetworkName,
    make_network,
)
from shared_core.for_torch.pretrained import library_weights, load_body
from shared_core.runs import UsageError
from shared_core.weights.finding import TRAINED, find_weights
from shared_core.weights.reading import read_weights
from torch_cls_zoo.models.aliases import FAST, RESNEST_FAST, resolve
from torch_cls_zoo.pruning.cutting import cut_channels

LIBRARY = "default"  # the library's own weights


@dataclass(frozen=True)
class Built:
    """A network that is ready for images ``(N, 3, H, W)`` and gives logits ``(N, num_classes)``."""

    model: nn.Module
    name: NetworkName
    mean: tuple[float, ...] = IMAGENET_MEAN  # per channel, of images in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD
    kept: dict[str, Any] = field(default_factory=dict)  # of a pruned network, for its checkpoints
    notes: tuple[str, ...] = ()  # what the user should be told, one line each
    start: dict[str, Any] = field(default_factory=dict)  # where the weights are from; empty: random


def build_model(
    arch: str,
    *,
    num_classes: int,
    pretrained: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    kept: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Built:
    """Build the network ``arch``.

    Args:
        arch: see :func:`torch_cls_zoo.models.aliases.resolve`.
        num_classes: outputs of the head, 2 or more.
        pretrained: None starts from random weights; ``"default"`` takes trained ones (an installed
            package's, or the library's own: from its cache, or fetched by it); else a name of the
            core's catalogue or a file: a checkpoint of this project, safetensors, a state dict of
            torch. A head of another size is left at random and that is noted; every other weight
            must fit.
        image_size: ``(height, width)`` in pixels, for networks that are built for one size.
        kept: channels that a pruned network has left, as its checkpoint says (fact ``pruned``). A
            pruned file as ``pretrained`` needs no telling.

    Returns:
        The network in training mode, with notes.

    Raises:
        ValueError: unknown name, a count below 2, a size that the network cannot take, or weights
            that cannot be had.
        FileNotFoundError: no such file of weights.
        CheckpointError: weights that do not fit.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2 or more")
    name = resolve(arch)
    network = _made(name, num_classes, image_size)
    notes: list[str] = []
    is_file = pretrained is not None and str(pretrained) != LIBRARY
    if kept is None and is_file:
        kept = pruned_widths(Path(str(pretrained)), arch)
    if kept:
        cut_channels(network.model, kept)
        notes.append(f"a pruned network: {len(kept)} layers are narrower than {arch} has them")
    start: dict[str, Any] = {}
    if pretrained is not None:
        start, more = _start(network, str(pretrained), num_classes, image_size)
        notes += more
    return Built(
        network.model,
        name,
        network.mean,
        network.std,
        kept={layer: dict(sides) for layer, sides in (kept or {}).items()},
        notes=tuple(notes),
        start=start,
    )


def _made(name: NetworkName, num_classes: int, image_size: tuple[int, int] | None) -> Network:
    if name.library == FAST:
        return Network(_resnest_fast(num_classes, *RESNEST_FAST[name.name]), name)
    try:
        return make_network(name, num_classes=num_classes, image_size=image_size)
    except ValueError as error:
        size = "" if image_size is None else f" with --image_size {image_size[0]} {image_size[1]}"
        raise ValueError(f"--arch {name.asked}{size}: {error}") from error


def _start(
    network: Network, init: str, num_classes: int, image_size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[str]]:
    """Put trained weights into the network; where they are from, and notes."""
    name = network.name
    found = find_weights(TRAINED if init == LIBRARY else init, architecture=name.name)
    if found is not None and (init != LIBRARY or name.library == "core"):
        weights, origin = from_numpy(read_weights(found.path)), found.path
        start = dict(found.facts())
    elif name.library == FAST:
        raise UsageError(f"--pretrained: the libraries have no weights for {name.asked}")
    else:
        weights, word = library_weights(name, image_size)
        origin, start = Path(word), {"name": word, "licence": "as the library says"}
    notes = load_body(
        network.model, weights, origin=origin, num_classes=num_classes, image_size=image_size
    )
    return start, notes


def pruned_widths(path: Path, arch: str) -> dict[str, Any] | None:
    """The channels left in a pruned checkpoint of ``arch``; None for any other file.

    Raises:
        CheckpointError: a damaged checkpoint, or a pruned network of another name.
    """
    if not path.is_file():
        return None
    try:
        _weights, facts = load_checkpoint(path)
    except CheckpointError as error:
        if "facts" in str(error) or "schema" in str(error):  # somebody else's file of weights
            return None
        raise
    found = facts.get("pruned")
    if not isinstance(found, dict) or not found:
        return None
    if facts["architecture"] != arch:
        raise CheckpointError(f"{path}: holds a pruned {facts['architecture']}, --arch says {arch}")
    return found


def _resnest_fast(num_classes: int, radix: int, cardinality: int, base_width: int) -> nn.Module:
    """ResNeSt-50 with its average pooling before the 3 x 3 convolution ("fast")."""
    from timm.models.resnest import ResNestBottleneck
    from timm.models.resnet import ResNet

    return ResNet(
        ResNestBottleneck,
        [3, 4, 6, 3],
        num_classes=num_classes,
        stem_type="deep",
        stem_width=32,
        avg_down=True,
        base_width=base_width,
        cardinality=cardinality,
        block_args={"radix": radix, "avd": True, "avd_first": True},
    )
