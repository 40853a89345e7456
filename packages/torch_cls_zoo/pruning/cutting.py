"""Cut channels off a slimmed network: choose by BatchNorm scale, cut, and prove it is the same.

A group of channels that hang together is as important as its largest BatchNorm scale. The least
important groups are cut. What is left must give the numbers of the whole network in which those
channels are set to 0 (the *masked* network); that is checked.

Source: Liu et al. 2017, arXiv:1708.06519, sections 3.2 and 3.3 (one threshold for all layers).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_cls_zoo.pruning.channel_graph import ChannelGraph, layers_of

Kept = dict[str, dict[str, list[int]]]  # by layer: channels kept of its "in" and its "out"


@dataclass(frozen=True)
class Plan:
    """What to cut.

    Attributes:
        cut: groups (roots of the graph) to cut.
        kept: what is left of each layer that loses something.
        groups: prunable groups in all.
        threshold: largest scale that is cut; 0 when nothing is.
    """

    cut: frozenset[int]
    kept: Kept
    groups: int
    threshold: float


def choose(graph: ChannelGraph, *, ratio: float, least: float = 0.1) -> Plan:
    """Choose the least important groups of channels.

    Args:
        graph: of the network.
        ratio: share of the prunable groups to cut, in [0, 1).
        least: share of each layer's channels that stays whatever happens, in (0, 1]; at least one.

    Raises:
        ValueError: a share out of range, or a network without prunable channels.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"--prune_ratio {ratio}, expected 0 <= ratio < 1")
    if not 0.0 < least <= 1.0:
        raise ValueError(f"--prune_least {least}, expected 0 < share <= 1")
    fixed = graph.fixed_roots()
    score: dict[int, float] = {}
    for name, layer in layers_of(graph, (_BatchNorm,)):
        if layer.weight is None:
            fixed.update(graph.roots(graph.writes[name]).tolist())
            continue
        for root, gamma in zip(
            graph.roots(graph.writes[name]).tolist(),
            layer.weight.detach().abs().tolist(),
            strict=True,
        ):
            score[root] = max(score.get(root, 0.0), gamma)
    prunable = sorted((value, root) for root, value in score.items() if root not in fixed)
    if not prunable:
        raise ValueError("no channel of this network can be cut: none has a BatchNorm scale alone")
    room: dict[str, int] = {}
    where: dict[int, list[str]] = {}
    for name, _layer in layers_of(graph, (_BatchNorm, nn.Conv2d)):
        roots = graph.roots(graph.writes[name]).tolist()
        room[name] = len(roots) - max(1, math.ceil(least * len(roots)))
        for root in roots:
            where.setdefault(root, []).append(name)
    wanted, cut, threshold = int(ratio * len(prunable)), set(), 0.0
    for value, root in prunable:
        if len(cut) == wanted:
            break
        if all(room[name] >= where[root].count(name) for name in where[root]):
            for name in where[root]:
                room[name] -= 1
            cut.add(root)
            threshold = value
    return Plan(frozenset(cut), _kept(graph, cut), len(prunable), threshold)


def _kept(graph: ChannelGraph, cut: set[int]) -> Kept:
    kept: Kept = {}
    for name in graph.writes:
        sides = {}
        for side, ids in (("in", graph.reads[name]), ("out", graph.writes[name])):
            stays = [i for i, root in enumerate(graph.roots(ids).tolist()) if root not in cut]
            if len(stays) < len(ids):
                sides[side] = stays
        if sides:
            kept[name] = sides
    return kept


def mask(model: nn.Module, kept: Mapping[str, Mapping[str, Sequence[int]]]) -> nn.Module:
    """A copy of ``model`` of full size in which all that is not kept is 0.

    Convolutions and BatchNorm lose scale, weight and bias of those output channels, so nothing
    comes out of them.
    """
    masked = copy.deepcopy(model)
    modules = dict(masked.named_modules())
    with torch.no_grad():
        for name, sides in kept.items():
            layer: Any = modules[name]
            if "out" not in sides:
                continue
            stays = torch.zeros(len(layer.weight), dtype=torch.bool)
            stays[torch.as_tensor(list(sides["out"]), dtype=torch.int64)] = True
            layer.weight[~stays] = 0.0
            if layer.bias is not None:
                layer.bias[~stays] = 0.0
    return masked


def cut_channels(model: nn.Module, kept: Mapping[str, Mapping[str, Sequence[int]]]) -> nn.Module:
    """Keep only those channels; ``model`` is changed and returned.

    Raises:
        ValueError: a layer that the network has not, or channels that it has not.
    """
    modules = dict(model.named_modules())
    for name, sides in kept.items():
        layer: Any = modules.get(name)
        if layer is None or set(sides) - {"in", "out"}:
            raise ValueError(f"pruned layer {name!r} is none of {type(model).__name__}")
        for side, stays in sides.items():
            size = len(layer.weight) if side == "out" else _inputs(layer)
            if not stays or not 0 <= min(stays) <= max(stays) < size:
                raise ValueError(
                    f"pruned layer {name!r}: {side} channels out of range, expected 0 to {size - 1}"
                )
        _cut_layer(layer, {side: torch.as_tensor(list(k)) for side, k in sides.items()})
    return model


def _inputs(layer: Any) -> int:
    if isinstance(layer, nn.Conv2d):
        return int(layer.in_channels)
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.num_features)


def _cut_layer(layer: Any, keep: dict[str, Tensor]) -> None:
    out, into = keep.get("out"), keep.get("in")
    if isinstance(layer, _BatchNorm):
        if out is not None:
            for name in ("weight", "bias"):
                _shrink(layer, name, out, 0)
            layer.running_mean = layer.running_mean[out].clone()
            layer.running_var = layer.running_var[out].clone()
            layer.num_features = len(out)
        return
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    if out is not None:
        _shrink(layer, "weight", out, 0)
        _shrink(layer, "bias", out, 0)
    if into is not None and not depthwise:
        _shrink(layer, "weight", into, 1)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.out_channels if depthwise else layer.weight.shape[1]
        layer.groups = layer.out_channels if depthwise else 1
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def _shrink(layer: nn.Module, name: str, keep: Tensor, axis: int) -> None:
    old = getattr(layer, name)
    if old is not None:
        new = old.detach().index_select(axis, keep.to(old.device)).clone()
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))


def prune(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    ratio: float,
    least: float = 0.1,
    tolerance: float = 1e-4,
) -> tuple[nn.Module, Plan, dict[str, float]]:
    """A smaller copy of ``model``, and the proof that it equals the masked network.

    Args:
        model: on the CPU; unchanged.
        image_size: height and width in pixels.
        ratio: see :func:`choose`.
        least: see :func:`choose`.
        tolerance: largest difference to the masked network, relative to its largest logit.

    Returns:
        The pruned network in eval mode; the plan; ``to_masked`` and ``to_whole``, the largest
        differences of logits on random images (relative to the largest logit).

    Raises:
        ValueError: nothing to cut, or the cut network is not the masked one; see also
            :class:`ChannelGraph`.
    """
    whole = copy.deepcopy(model).eval()
    graph = ChannelGraph(whole, torch.zeros(1, 3, *image_size))
    plan = choose(graph, ratio=ratio, least=least)
    masked = mask(whole, plan.kept).eval()
    pruned = cut_channels(copy.deepcopy(whole), plan.kept).eval()
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.standard_normal((2, 3, *image_size)).astype(np.float32))
    with torch.no_grad():
        got, reference, before = pruned(images), masked(images), whole(images)
    size = float(reference.abs().max()) or 1.0
    facts = {
        "to_masked": float((got - reference).abs().max()) / size,
        "to_whole": float((got - before).abs().max()) / (float(before.abs().max()) or 1.0),
    }
    if not facts["to_masked"] <= tolerance:
        raise ValueError(
            f"the cut {type(model).__name__} differs from the masked one by "
            f"{facts['to_masked']:.1e}, expected at most {tolerance:.0e}"
        )
    return pruned, plan, facts


def merge_kept(first: Mapping[str, Mapping[str, Sequence[int]]], second: Kept) -> Kept:
    """Channels of the whole network that two cuts leave, the second of the first's rest."""
    merged: Kept = {name: {s: list(k) for s, k in sides.items()} for name, sides in first.items()}
    for name, sides in second.items():
        entry = merged.setdefault(name, {})
        for side, stays in sides.items():
            base = entry.get(side)
            entry[side] = list(stays) if base is None else [base[i] for i in stays]
    return merged
