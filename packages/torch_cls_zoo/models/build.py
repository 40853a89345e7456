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
from shared_core.weights.catalogue import CATALOGUE, entry
from shared_core.weights.finding import NONE, TRAINED, find_weights, how_to_get
from shared_core.weights.reading import read_weights
from torch_cls_zoo.models.aliases import FAST, RESNEST_FAST, resolve
from torch_cls_zoo.pruning.cutting import cut_channels


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
    init: str | Path = NONE,
    image_size: tuple[int, int] | None = None,
    kept: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    drop_path: float = 0.0,
) -> Built:
    """Build the network ``arch``.

    Args:
        arch: see :func:`torch_cls_zoo.models.aliases.resolve`.
        num_classes: outputs of the head, 2 or more.
        init: ``none`` starts from random weights; ``trained`` takes trained ones (an installed
            package's, or the library's own: from its cache, or fetched by it); else a name of the
            core's catalogue or a file: a checkpoint of this project, safetensors, a state dict of
            torch. A head of another size is left at random and that is noted; every other weight
            must fit.
        image_size: ``(height, width)`` in pixels, for networks that are built for one size.
        kept: channels that a pruned network has left, as its checkpoint says (fact ``pruned``). A
            pruned file as ``init`` needs no telling.
        drop_path: stochastic depth of the last block, in ``[0, 1)``.

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
    network = _made(name, num_classes, image_size, drop_path)
    notes: list[str] = []
    if kept is None and str(init) not in (NONE, TRAINED):
        kept = pruned_widths(Path(init), arch)
    if kept:
        cut_channels(network.model, kept)
        notes.append(f"a pruned network: {len(kept)} layers are narrower than {arch} has them")
    start: dict[str, Any] = {}
    if str(init) != NONE:
        start, more = _start(network, str(init), num_classes, image_size)
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


def lacking_weights(arch: str) -> str | None:
    """Why no trained weights of ``arch`` are here, and what helps; None where they are.

    Nothing is fetched: an installed package and the libraries' caches are looked at.

    Raises:
        ValueError: unknown name.
        CheckpointError: an installed file that is not what its package publishes.
    """
    name = resolve(arch)
    if name.library == "core":
        known = entry(name.name)
        if find_weights(TRAINED, architecture=name.name) is not None:
            return None
        return f"get those of {arch} by: {how_to_get(known or CATALOGUE[0])}"
    if name.library != FAST and _cached(name):
        return None
    return (
        f"--init {TRAINED} lets the library fetch those of {arch} where there is a network, "
        f"--init FILE takes yours, and -a {CATALOGUE[0].name} has its own, by: "
        f"{how_to_get(CATALOGUE[0])}"
    )


def _cached(name: NetworkName) -> bool:
    """Whether the library fetched a network's weights before."""
    from torch import hub

    folder = Path(hub.get_dir()) / "checkpoints"
    if name.library == "torchvision":
        from torchvision import models

        which = models.get_model_weights(name.name)
        return len(which) > 0 and (folder / which.DEFAULT.url.rpartition("/")[2]).is_file()
    from huggingface_hub import try_to_load_from_cache
    from timm import get_pretrained_cfg

    config = get_pretrained_cfg(name.name)
    if config is None or not config.has_weights:
        return False
    if config.url and (folder / str(config.url).rpartition("/")[2]).is_file():
        return True
    files = ("model.safetensors", "pytorch_model.bin")
    where = config.hf_hub_id
    return bool(where) and any(isinstance(try_to_load_from_cache(where, f), str) for f in files)


def takes_drop_path(arch: str) -> bool:
    """Whether the network has blocks that can be skipped at random."""
    try:
        _made(resolve(arch), 2, None, 0.1)
    except ValueError:
        return False
    return resolve(arch).library != FAST


def _made(
    name: NetworkName, num_classes: int, image_size: tuple[int, int] | None, drop_path: float
) -> Network:
    if name.library == FAST:
        return Network(_resnest_fast(num_classes, *RESNEST_FAST[name.name]), name)
    try:
        return make_network(
            name, num_classes=num_classes, image_size=image_size, drop_path_rate=drop_path
        )
    except ValueError as error:
        size = "" if image_size is None else f" with --image_size {image_size[0]} {image_size[1]}"
        raise ValueError(f"--arch {name.asked}{size}: {error}") from error


def _start(
    network: Network, init: str, num_classes: int, image_size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[str]]:
    """Put trained weights into the network; where they are from, and notes."""
    name = network.name
    found = find_weights(init, architecture=name.name)
    if found is not None and (init != TRAINED or name.library == "core"):
        weights, origin = from_numpy(read_weights(found.path)), found.path
        start = dict(found.facts())
    elif name.library == FAST:
        raise UsageError(f"--init: the libraries have no weights for {name.asked}")
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
