"""What a network starts from: trained weights of a file, a package or a library, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from landmark_distill.backbones import CLASSES, LibraryEncoder, without_head
from landmark_distill.config import AUTO, BACKBONES, NONE, TRAINED, NetworkConfig
from landmark_distill.feature_layer import class_directions, turned, whitening
from landmark_distill.model import EmbeddingModel, load_weights
from landmark_distill.model_files import check_channels, is_head, read_model, read_own
from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import from_numpy
from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.networks import NetworkName, find_network, make_network
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.pretrained import library_weights, load_body
from shared_core.runs.command import UsageError
from shared_core.weights.finding import find_weights
from shared_core.weights.reading import read_weights

TABLE = "relative_position_bias_table"
DERIVED = ("attn_mask", "relative_position_index")  # buffers that a Swin works out itself
SWIN_BASE = {7: "swin_base_patch4_window7_224", 12: "swin_base_patch4_window12_384"}  # of timm
FITTING = (
    "Swin_base of 1024 features takes files of Microsoft's and timm's; torchvision's ResNet50 is "
    "--backbone_class torchvision/resnet50"
)


@dataclass(frozen=True)
class Start:
    """Where first weights came from.

    Attributes:
        line: for people.
        facts: name, sha256, licence, for records and model folders; empty: from nothing.
        trained_body: the body alone is trained; feature layer and head are new.
    """

    line: str
    facts: dict[str, Any] = field(default_factory=dict)
    trained_body: bool = False


def start_model(model: EmbeddingModel, network: NetworkConfig, init: str, *, bgr: bool) -> Start:
    """Give a new network the weights that ``--init`` means.

    A file of this project must fit whole, feature layer and, where both have one of their own,
    head. Of anything else the body is taken. Nothing changes when something does not fit.

    Args:
        init: ``auto`` (trained weights where they can be had, else none), ``none``, ``trained``,
            a name of the catalogue, or a file.
        bgr: the network sees blue first.

    Raises:
        UsageError: no such weights, or none that can be had here.
        ValueError, CheckpointError: weights that do not fit.
    """
    if init == NONE:
        return Start("starts from nothing, as --init none says")
    if init != AUTO:
        return _start(model, network, init, bgr=bgr)
    if network.name in BACKBONES:
        return Start(
            f"starts from nothing: no trained weights of {network.name} are looked for; {FITTING}, "
            "each by --init FILE"
        )
    try:
        return _start(model, network, TRAINED, bgr=bgr)
    except UsageError as error:
        return Start(f"starts from nothing: {error}")


def _start(model: EmbeddingModel, network: NetworkConfig, init: str, *, bgr: bool) -> Start:
    if Path(init).is_file():
        own = read_own(init)
        if own is not None:
            return _from_own(model, init, *own, bgr=bgr)
    if network.name in BACKBONES:
        weights, facts = _for_own_network(network, init)
        notes = _fill_own(model.encoder, network, weights, origin=str(facts["name"]))
    else:
        weights, facts = _for_library(find_network(network.name), network, init)
        notes = _fill_library(model.encoder, network, weights, origin=str(facts["name"]))
    shown = [str(facts[key])[:12] for key in ("sha256", "licence") if key in facts]
    said = "".join(f"; {note}" for note in notes)
    line = f"starts from the trained body {facts['name']} ({', '.join(shown)}){said}"
    return Start(line, facts, trained_body=True)


def _from_own(
    model: EmbeddingModel,
    path: str,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    *,
    bgr: bool,
) -> Start:
    check_channels(path, stored, bgr=bgr)
    own_head = model.head is not None and not model.head.frozen
    whole = own_head and any(is_head(name) for name in weights)
    load_weights(model if whole else model.encoder, dict(weights), source=path)
    facts = {"name": Path(path).name, "sha256": stored["sha256"], "licence": "of its run"}
    return Start(f"starts from {Path(path).name} ({stored['sha256'][:12]}), every weight", facts)


def start_features(
    model: EmbeddingModel,
    batches: Iterable[TorchBatch],
    *,
    precision: Precision,
    goals: Callable[[TorchBatch], Tensor] | None = None,
) -> str:
    """Start the new layer above a trained body, and a head of its own, from training images.

    Args:
        batches: one view of each training image, with the labels of the head's rows.
        goals: the teacher's features of a batch ``(N, F)``, which the layer is turned to.

    Returns:
        What was done, for people and records.
    """
    model.eval()
    rows, labels, wanted = [], [], []
    for batch in batches:
        with torch.no_grad(), precision.autocast():
            rows.append(model.encoder.seen(batch.images).double().cpu().numpy())
        labels.append(batch.labels.cpu().numpy())
        if goals is not None:
            wanted.append(goals(batch).double().cpu().numpy())
    seen, truth = np.concatenate(rows), np.concatenate(labels)
    layer = whitening(seen, truth, width=model.feature_dim)
    if goals is not None:
        layer = turned(layer, seen, np.concatenate(wanted))
    project, head = model.encoder.project, model.head
    with torch.no_grad():
        project.weight.copy_(torch.from_numpy(layer.weight))
        project.bias.copy_(torch.from_numpy(layer.bias))
        if head is not None and not head.frozen:
            means = class_directions(layer(seen), truth, count=head.num_classes)
            known = torch.from_numpy(np.flatnonzero(means.any(axis=1)))
            head.weight[known] = torch.from_numpy(means).to(head.weight)[known]
    turn = ", turned to the teacher's" if goals is not None else ""
    return f"the feature layer whitens {len(seen)} training images within their classes{turn}"


# -- networks of a library ------------------------------------------------------------------------


def _for_library(
    found: NetworkName, network: NetworkConfig, init: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = find_weights(init, architecture=found.name if found.library == "core" else "")
    if file is not None:
        return from_numpy(read_weights(file.path)), dict(file.facts())
    sides = (network.image_size, network.image_size)
    weights, word = library_weights(found, sides)
    return weights, {"name": word, "licence": "as the library says"}


def _fill_library(
    encoder: nn.Module, network: NetworkConfig, weights: dict[str, Tensor], *, origin: str
) -> list[str]:
    """The body of a whole network that the weights fit; its head is of no use here."""
    if not isinstance(encoder, LibraryEncoder):
        raise ValueError(f"{network.name} is no network of a library")
    sides = (network.image_size, network.image_size)
    whole = make_network(network.name, num_classes=CLASSES, image_size=sides).model
    if hasattr(whole, "layers") and any(TABLE in name for name in weights):
        weights = swin_layout(weights, merge_first=True)
        weights = {
            {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}.get(k, k): v
            for k, v in weights.items()
        }
        weights = _fitted_tables(weights, whole.state_dict())
    load_body(whole, weights, origin=origin, num_classes=CLASSES, image_size=sides)
    encoder.body.load_state_dict(without_head(whole)[0].state_dict())
    return []


# -- our own networks -----------------------------------------------------------------------------


def _for_own_network(network: NetworkConfig, init: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if init == TRAINED:
        window = network.options.get("window") or round(network.image_size / 32)
        asked = SWIN_BASE.get(window, SWIN_BASE[7])
        if network.name != "Swin_base" or network.feature_dim != 1024:
            raise UsageError(
                f"--init {TRAINED}: there are none of {network.name} with {network.feature_dim} "
                f"features; {FITTING}; or --init {NONE}"
            )
        sides = (network.image_size, network.image_size)
        weights, word = library_weights(find_network(f"timm/{asked}"), sides)
        return weights, {"name": word, "licence": "as the library says"}
    file = find_weights(init, architecture="")
    if file is None or file.network is not None:
        raise UsageError(f"--init {init}: {network.name} takes a file, or {NONE}; {FITTING}")
    return read_model(file.path)[0], dict(file.facts())


def _fill_own(
    encoder: nn.Module, network: NetworkConfig, weights: dict[str, Tensor], *, origin: str
) -> list[str]:
    """A file without facts: of the published code, of Microsoft's Swin or of timm's."""
    own = encoder.state_dict()
    inside = {k.removeprefix("encoder."): v for k, v in weights.items() if k[:8] == "encoder."}
    given = {k: v for k, v in (inside or weights).items() if not k.startswith(("head.", "fc."))}
    given = {k: v for k, v in given.items() if not k.endswith(DERIVED)}
    if any(TABLE in name for name in given):
        given = swin_layout(given, merge_first=False)
    before = given
    given = _fitted_tables(given, own)
    try:
        load_weights(encoder, given, source=origin)
    except ValueError as error:
        raise CheckpointError(f"{error}; {network.name}: {FITTING}") from None
    changed = sum(given[k].shape != before[k].shape for k in given)
    return [f"{changed} tables of relative positions fitted to other windows"] if changed else []


# -- layouts of Swin ------------------------------------------------------------------------------


def swin_layout(weights: Mapping[str, Tensor], *, merge_first: bool) -> dict[str, Tensor]:
    """Names of a Swin: Microsoft merges at a stage's end, timm at the beginning of the next.

    Args:
        merge_first: as timm names them; else as Microsoft does.
    """
    merges = [name.split(".") for name in weights if ".downsample." in name]
    is_first = not any(parts[1] == "0" for parts in merges)
    step = 0 if is_first == merge_first else (1 if merge_first else -1)
    found = {}
    for name, value in weights.items():
        parts = name.split(".")
        if step and ".downsample." in name:
            parts[1] = str(int(parts[1]) + step)
        if not name.endswith(DERIVED):
            found[".".join(parts)] = value
    return found


def _fitted_tables(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables of relative positions ``((2 w - 1)^2, heads)`` for other windows, bicubic.

    Source: Liu et al. 2021, arXiv:2103.14030, section 3.2 (relative position bias).
    """
    found = dict(weights)
    for name, value in weights.items():
        if not name.endswith(TABLE) or name not in own or own[name].shape == value.shape:
            continue
        before, after = math.isqrt(len(value)), math.isqrt(len(own[name]))
        if before**2 != len(value) or value.shape[1] != own[name].shape[1]:
            continue  # another network: the check of all weights says so
        grid = value.float().T.reshape(1, -1, before, before)
        grid = torch.nn.functional.interpolate(grid, (after, after), mode="bicubic")
        found[name] = grid.reshape(-1, after * after).T.contiguous()
    return found
