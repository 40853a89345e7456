"""Start a network from trained weights: a file, an installed package, or the library's download."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import fit_into, from_numpy
from shared_core.for_torch.networks import (
    Network,
    NetworkName,
    find_network,
    head_keys,
    head_names,
    make_network,
)
from shared_core.runs.command import UsageError
from shared_core.weights.catalogue import CATALOGUE, entry
from shared_core.weights.finding import NONE, find_weights, how_to_get
from shared_core.weights.reading import read_weights

# DenseNet files of torchvision carry names with dots that modules cannot have.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)
_AUXILIARY = re.compile(r"^(AuxLogits|aux1|aux2|aux_logits)\.")


def start_network(
    name: NetworkName | str,
    *,
    init: str | Path,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Network:
    """A network with the weights that ``--init`` means, all but a head of another size.

    Args:
        name: see :func:`~shared_core.for_torch.networks.find_network`.
        init: ``none``, ``trained``, a name of the catalogue, or a file.
        num_classes, image_size, drop_rate, drop_path_rate: see
            :func:`~shared_core.for_torch.networks.make_network`.

    Raises:
        UsageError: no such weights, or none that can be had here; the line says how to get some.
        ValueError, CheckpointError: an unknown network, or weights that do not fit.
    """
    found = find_network(name) if isinstance(name, str) else name
    network = make_network(
        found,
        num_classes=num_classes,
        image_size=image_size,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )
    if str(init) == NONE:
        return network
    file = find_weights(init, architecture=found.name if found.library == "core" else "")
    if file is not None:
        weights, origin, start = from_numpy(read_weights(file.path)), file.path, file.facts()
    else:
        weights, word = library_weights(found, image_size)
        origin, start = Path(word), {"name": word, "licence": "as the library says"}
    notes = load_body(
        network.model, weights, origin=origin, num_classes=num_classes, image_size=image_size
    )
    return dataclasses.replace(network, notes=(*network.notes, *notes), start=start)


def library_weights(
    found: NetworkName, image_size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The library's weights for ImageNet, and a word where they come from.

    timm fits those of a network for one size to ``image_size`` itself.

    Raises:
        UsageError: the library has none, or they can neither be found in its cache nor fetched.
    """
    known = entry(found.name)
    if found.library == "core" and known is not None:
        raise UsageError(
            f"no trained weights of {found.name} are installed; get them by: {how_to_get(known)}"
        )
    try:
        if found.library == "torchvision":
            from torchvision import models

            which = models.get_model_weights(found.name)
            if not len(which):
                raise ValueError("torchvision has none")
            chosen = which.DEFAULT
            return dict(chosen.get_state_dict(progress=False, check_hash=True)), str(chosen)
        import timm

        config = timm.get_pretrained_cfg(found.name)
        if config is None or not config.has_weights:
            raise ValueError("timm has none")
        # Its own file reader knows about renamed weights, so it builds its own network.
        sized = config.fixed_input_size and image_size is not None
        settings = {"img_size": image_size} if sized else {}
        model = timm.create_model(found.name, pretrained=True, **settings)
        return model.state_dict(), f"timm {found.name}.{config.tag}"
    except Exception as error:  # fetching ends in errors of urllib, requests, httpx, the hub ...
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UsageError(
            f"no trained weights of {found.asked} can be had here ({reason}): give a file by "
            f"--init FILE, say --init {NONE}, or take {CATALOGUE[0].name}, whose weights come by: "
            f"{how_to_get(CATALOGUE[0])}"
        ) from error


def load_body(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    origin: str | Path,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
) -> list[str]:
    """Put weights into ``model``, all but a head of another size.

    Args:
        model: as built; its head has ``num_classes`` outputs.
        weights: a state dict of the same architecture.
        origin: the file, or a word, for messages.
        num_classes: outputs of the model's head.
        image_size: ``(height, width)``: position embeddings of another size are interpolated.

    Returns:
        Notes for the user.

    Raises:
        CheckpointError: weights that do not fit; the model is as it was.
    """
    given = {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in weights.items()}
    own = model.state_dict()
    given = {k: v for k, v in given.items() if k in own or not _AUXILIARY.match(k)}
    notes = []
    for key in [k for k in own if k.endswith(("pos_embed", "pos_embedding"))]:
        if key in given and given[key].shape != own[key].shape:
            given[key] = _other_grid(given[key], own[key], image_size, where=f"{origin}: {key}")
            notes.append(f"{key} was interpolated to {tuple(own[key].shape)}")
    heads = head_names(model, num_classes)
    keys = head_keys(heads, list(own))
    if any(k not in given or given[k].shape != own[k].shape for k in keys):
        sizes = [v.shape[0] for k, v in given.items() if k in keys and k.endswith("bias")]
        before = f" of {sizes[0]} classes" if sizes else ""
        given = {k: v for k, v in given.items() if k not in keys}
        given.update({k: own[k] for k in keys})
        notes.append(
            f"the head{before} ({', '.join(heads)}) was replaced by a new one for "
            f"{num_classes} classes"
        )
    for name, value in own.items():  # a counter that older files lack; it decides nothing
        if name.endswith("num_batches_tracked") and name not in given:
            given[name] = value
    fit_into(model, given, path=origin)
    return notes


def _other_grid(
    given: Tensor, own: Tensor, image_size: tuple[int, int] | None, *, where: str
) -> Tensor:
    """Position embeddings ``(1, prefix + rows * columns, D)`` on another grid, bicubic."""
    prefix = 0 if math.isqrt(given.shape[1]) ** 2 == given.shape[1] else 1
    side = math.isqrt(given.shape[1] - prefix)
    wanted = own.shape[1] - prefix
    if given.ndim != 3 or side * side + prefix != given.shape[1] or given.shape[2] != own.shape[2]:
        raise CheckpointError(
            f"{where} is {tuple(given.shape)}, expected a grid of {own.shape[-1]} numbers"
        )
    height, width = image_size or (1, 1)
    rows = round(math.sqrt(wanted * height / width))
    if rows < 1 or wanted % rows:
        raise CheckpointError(f"{where}: {wanted} positions form no grid for this image size")
    grid = given[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = torch.nn.functional.interpolate(
        grid, (rows, wanted // rows), mode="bicubic", antialias=True, align_corners=False
    )
    flat = grid.permute(0, 2, 3, 1).reshape(1, wanted, -1).to(given.dtype)
    return torch.cat([given[:, :prefix], flat], dim=1)


def parameter_groups(
    model: nn.Module,
    *,
    num_classes: int,
    body_lr: float,
    head_lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the head at its own rate, the body's slower the deeper they lie.

    Depth is the order in which the network's children (and, in a sequence of blocks, the blocks)
    stand; a norm between them lies where the layer before it does. Biases and what has one axis
    (norms) are not decayed. Parameters that do not learn are left out.

    Args:
        num_classes: outputs of the head.
        body_lr: of the body's last layers.
        head_lr: of the head.
        weight_decay: of matrices and kernels.
        layer_decay: factor from one depth to the one below; 1 gives the whole body one rate.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``.

    Source: layer-wise decay: Howard and Ruder 2018, arXiv:1801.06146; Bao et al. 2021,
    arXiv:2106.08254, appendix.
    """
    heads = tuple(f"{head}." for head in head_names(model, num_classes))
    axes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(heads):
            axes[_place(name)] = max(axes.get(_place(name), 0), parameter.ndim)
    depths, depth = {}, -1
    for place, most in axes.items():
        depth += most > 1 or depth < 0
        depths[place] = depth
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below = depth - depths[_place(name)] if not name.startswith(heads) else 0
        lr = head_lr if name.startswith(heads) else body_lr * layer_decay**below
        decay = 0.0 if parameter.ndim <= 1 else weight_decay
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _place(name: str) -> str:
    """The block that a parameter lies in: ``blocks.2.0`` of ``blocks.2.0.conv_dw.weight``."""
    found = re.match(r"^\w+(?:\.(?:\d+|\w+_\d+|blocks?|layers?)(?=\.))*", name)
    return found[0] if found else name
