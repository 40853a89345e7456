"""Weights to start from: the library's own or a file; a head of another size is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, load_foreign_weights
from torch_cls_zoo.models.aliases import Resolved
from torch_cls_zoo.models.head import head_keys, head_names

# DenseNet files of torchvision carry names with dots that modules cannot have.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)
_AUXILIARY = re.compile(r"^(AuxLogits|aux1|aux2|aux_logits)\.")


def library_weights(
    found: Resolved, image_size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The library's weights for ImageNet, and a word where they come from.

    timm fits those of a network for one size to ``image_size`` itself.

    Raises:
        ValueError: the library has none, or they can neither be found in its cache nor fetched.
    """
    if found.library == "resnest_fast":
        raise ValueError(f"--pretrained: the libraries have no weights for {found.arch}")
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
        raise ValueError(
            f"--pretrained: no weights of the library for {found.arch} ({reason}); "
            "give a file: --pretrained FILE"
        ) from error


def pruned_widths(path: str | Path, arch: str) -> dict[str, Any] | None:
    """The channels left in a pruned checkpoint of ``arch``; None for any other file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a damaged checkpoint, or a pruned network of another name.
    """
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


def load_pretrained(
    model: nn.Module,
    origin: str | Path,
    *,
    weights: Mapping[str, Tensor] | None,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
) -> list[str]:
    """Put weights into ``model``, all but a head of another size.

    Args:
        model: as built; its head has ``num_classes`` outputs.
        origin: the file; or a word for messages when ``weights`` are given.
        weights: a state dict; None reads the file.
        num_classes: outputs of the model's head.
        image_size: ``(height, width)``: position embeddings of another size are interpolated.

    Returns:
        Notes for the user.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: hostile, damaged, or weights that do not fit; the model is as it was.
    """
    given = load_foreign_weights(origin) if weights is None else dict(weights)
    given = {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in given.items()}
    own = model.state_dict()
    given = {k: v for k, v in given.items() if k in own or not _AUXILIARY.match(k)}
    notes = []
    for key in [k for k in own if k.endswith(("pos_embed", "pos_embedding"))]:
        if key in given and given[key].shape != own[key].shape:
            given[key] = _other_grid(given[key], own[key], image_size, where=f"{origin}: {key}")
            notes.append(f"{key} was interpolated to {tuple(own[key].shape)}")
    heads = head_names(model, num_classes)
    keys = head_keys(heads, list(own))
    differs = [k for k in keys if k not in given or given[k].shape != own[k].shape]
    if differs:
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
        raise CheckpointError(f"{where}: {wanted} positions form no grid for this --image_size")
    grid = given[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = torch.nn.functional.interpolate(
        grid, (rows, wanted // rows), mode="bicubic", antialias=True, align_corners=False
    )
    flat = grid.permute(0, 2, 3, 1).reshape(1, wanted, -1).to(given.dtype)
    return torch.cat([given[:, :prefix], flat], dim=1)
